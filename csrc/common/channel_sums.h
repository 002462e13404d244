// The size of the [rows][channels] workspace in which CUDA kernels sum up each channel, for the bias gradient.
#pragma once

#include "types.h"

namespace alexnet_ext {

// With more channels, each thread sums one channel instead of a vector.
constexpr int64_t kMaxLaneSums = 2048;

// Four blocks on each multiprocessor.
constexpr int64_t kFullGpu = 4 * kHopperMultiprocessors;

// Enough rows to fill a GPU. They are a multiple of a pixel's vectors of eight channels, so that a thread keeps its
// channels. The number depends on the shape alone, so that the same input gives the same bits on every GPU.
inline int64_t sum_rows_of(const Images& s) {
  // The least work of a row. kElements keeps a block busy; kPixels pays for writing the row and reading it again.
  constexpr int64_t kElements = 2048, kPixels = 32;
  const int64_t pixels = s.batch * s.height * s.width;
  const int64_t by_elements = ceil_div(pixels * s.channels, kElements), by_pixels = ceil_div(pixels, kPixels);
  const int64_t most = by_elements < by_pixels ? by_elements : by_pixels;
  const int64_t lanes = s.channels % 8 == 0 && s.channels <= kMaxLaneSums ? s.channels / 8 : 1;
  return ceil_div(most < kFullGpu ? most : kFullGpu, lanes) * lanes;
}

}  // namespace alexnet_ext
