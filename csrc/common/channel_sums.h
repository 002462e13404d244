// How large the workspace is through which CUDA kernels add up each channel, a bias's gradient: [rows][channels].
#pragma once

#include "types.h"

namespace alexnet_ext {

// More channels are summed element by element.
constexpr int64_t kMaxLaneSums = 2048;

// Four blocks on each multiprocessor.
constexpr int64_t kFullGpu = 4 * kHopperMultiprocessors;

// Enough rows to fill a GPU, and a multiple of the eighths of the channels, so that a thread stays at its channels.
// It hangs on the shape alone, so that the same input gives the same bits on every GPU.
inline int64_t sum_rows_of(const Images& s) {
  // At least so much for a row: elements, as a block has; and pixels, as the row is written and read once more.
  constexpr int64_t kElements = 2048, kPixels = 32;
  const int64_t pixels = s.batch * s.height * s.width;
  const int64_t by_elements = ceil_div(pixels * s.channels, kElements), by_pixels = ceil_div(pixels, kPixels);
  const int64_t most = by_elements < by_pixels ? by_elements : by_pixels;
  const int64_t lanes = s.channels % 8 == 0 && s.channels <= kMaxLaneSums ? s.channels / 8 : 1;
  return ceil_div(most < kFullGpu ? most : kFullGpu, lanes) * lanes;
}

}  // namespace alexnet_ext
