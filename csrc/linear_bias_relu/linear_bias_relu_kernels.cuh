// ReLU's gradient in a linear layer on CUDA, and its sums over the rows, in one launch. Bytes: dy and y are read once
// and dz is written once. The products are cuBLAS's.
#pragma once

#include "../common/channel_sums.cuh"
#include "linear_bias_relu.h"

namespace alexnet_ext {

// A block takes this many vectors of neighbouring outputs, 64 bytes, and all rows. Its other threads divide the rows.
constexpr int kColumnVectors = 4;

// Null total: no bias gradient. Two rows are in flight together: at a batch of 128 these are all of a thread's. Places
// are counted in vectors, without which nvcc splits the stores.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_mask_columns_vectors_kernel(int64_t rows, int64_t vectors, const T* __restrict__ dy, const T* __restrict__ y,
                                     T* __restrict__ dz, T* __restrict__ total) {
  constexpr int V = kVector<T>, kRound = 2, kRuns = kBlockThreads / kColumnVectors;
  const int64_t before = static_cast<int64_t>(blockIdx.x) * kColumnVectors;
  const int64_t vector = before + threadIdx.x % kColumnVectors;
  Acc<T> sum[V] = {};
  if (vector < vectors)
    for (int64_t first = threadIdx.x / kColumnVectors; first < rows; first += kRound * kRuns) {
      Acc<T> gradient[kRound][V], result[kRound][V];
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const int64_t row = first + i * kRuns, at = (row < rows ? row : first) * vectors + vector;
        load<V>(gradient[i], dy + at * V);
        load<V>(result[i], y + at * V);
      }
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const bool inside = first + i * kRuns < rows;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (result[i][j] <= 0) gradient[i][j] = 0;  // <= 0, so that a NaN keeps its gradient
          sum[j] += inside ? gradient[i][j] : Acc<T>(0);
        }
        if (inside) store<V>(dz + ((first + i * kRuns) * vectors + vector) * V, gradient[i]);
      }
    }
  if (total == nullptr) return;
  for_owned_sums(
      sum, kColumnVectors, 0, kBlockThreads, [](int i) { return i; },
      [&](int output, Acc<T> value) {
        if (before * V + output < vectors * V) total[before * V + output] = narrow<T>(value);
      });
}

}  // namespace alexnet_ext
