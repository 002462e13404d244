// How large the workspace is through which CUDA kernels add up each channel, a bias's gradient: [rows][channels].
#pragma once

#include "types.h"

namespace alexnet_ext {

// More channels are summed element by element.
constexpr int64_t kMaxLaneSums = 2048;

// Enough rows to fill a GPU, and a multiple of the eighths of the channels, so that a thread stays at its channels.
// It hangs on the shape alone, so that the same input gives the same bits on every GPU.
inline int64_t sum_rows_of(const Images& s) {
  constexpr int64_t kRows = 528, kElements = 2048;  // four blocks on each of 132 multiprocessors; a block's elements
  const int64_t wanted = ceil_div(s.batch * s.channels * s.height * s.width, kElements);
  const int64_t lanes = s.channels % 8 == 0 && s.channels <= kMaxLaneSums ? s.channels / 8 : 1;
  return ceil_div(wanted < kRows ? wanted : kRows, lanes) * lanes;
}

}  // namespace alexnet_ext
