// The size of the [rows][channels] workspace in which CUDA kernels sum up each channel, for the bias gradient.
#pragma once

#include <numeric>

#include "types.h"

namespace alexnet_ext {

// With more channels, each thread sums one channel instead of a vector.
constexpr int64_t kMaxLaneSums = 2048;

// Four blocks on each multiprocessor.
constexpr int64_t kFullGpu = 4 * kHopperMultiprocessors;

// Enough rows to fill a GPU that runs `slots` blocks at a time, and no more, as a block that is left over would run
// alone. A row is a block. The number depends on the shape alone, so that the same input gives the same bits on every
// GPU.
inline int64_t sum_rows_of(const Images& s, int64_t slots = kFullGpu) {
  // The least work of a row. kElements keeps a block busy; kPixels pays for writing the row and reading it again.
  constexpr int64_t kElements = 2048, kPixels = 32;
  // A block takes 240 or 256 vectors of eight channels at a time. Where all rows together take whole pixels, a thread
  // keeps its channels.
  constexpr int64_t kBlockVectors = std::gcd(240, 256);
  const int64_t pixels = s.batch * s.height * s.width;
  const int64_t by_elements = ceil_div(pixels * s.channels, kElements), by_pixels = ceil_div(pixels, kPixels);
  const int64_t busy = by_elements < by_pixels ? by_elements : by_pixels;
  const int64_t lanes = s.channels % 8 == 0 && s.channels <= kMaxLaneSums ? s.channels / 8 : 1;
  const int64_t step = lanes / std::gcd(lanes, kBlockVectors), most = slots / step;
  const int64_t steps = ceil_div(busy, step);
  return (steps < most ? steps : most) * step;
}

}  // namespace alexnet_ext
