// Bias and ReLU after a convolution on CUDA. Bytes: forward y is read and written once. Backward dy and y are read once
// and dz is written once; the bias gradient is summed in the same pass.
#pragma once

#include "../common/channel_sums.cuh"
#include "conv2d_bias_relu.h"

namespace alexnet_ext {

// A thread takes V values that are adjacent in memory. Channels-last they have V neighbouring channels. Contiguous they
// have one channel, or two where they cross the end of a plane.
template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    bias_relu_kernel(DeviceImages s, Divisor by_plane, int64_t n, T* __restrict__ y, const T* __restrict__ bias) {
  for_each(n / V, [&](int64_t i) {
    Acc<T> values[V], b[V] = {};
    load<V>(values, y + i * V);
    if (bias != nullptr && s.channels_last) {
      load<V>(b, bias + (i * V - s.by_channels.divide(i * V) * s.channels));
    } else if (bias != nullptr) {
      const int64_t plane = by_plane.divide(i * V), left = (plane + 1) * by_plane.value - i * V;
      const int channel = static_cast<int>(plane - s.by_channels.divide(plane) * s.channels);
      const Acc<T> own = widen(bias[channel]), next = widen(bias[channel + 1 < s.channels ? channel + 1 : 0]);
#pragma unroll
      for (int j = 0; j < V; ++j) b[j] = j < left ? own : next;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Acc<T> v = values[j] + b[j];
      values[j] = v <= 0 ? Acc<T>(0) : v;  // <= 0, so that NaN passes
    }
    store<V>(y + i * V, values);
  });
}

// Channels-last, V channels a thread. Null sums: no bias gradient.
template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_mask_vectors_kernel(Divisor vectors, int64_t n, const T* __restrict__ dy, const T* __restrict__ y,
                             T* __restrict__ dz, Acc<T>* __restrict__ sums) {
  Acc<T> sum[V] = {};
  for_each(n / V, [&](int64_t i) {
    Acc<T> gradient[V], result[V];
    load<V>(gradient, dy + i * V);
    load<V>(result, y + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (result[j] <= 0) gradient[j] = 0;
      sum[j] += gradient[j];
    }
    store<V>(dz + i * V, gradient);
  });
  if (sums != nullptr) sum_vectors<V, kWarp>(sum, vectors, sums);
}

// Any layout, element by element. Null sums: no bias gradient.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_mask_kernel(DeviceImages s, ChannelBlocks work, const T* __restrict__ dy, const T* __restrict__ y,
                     T* __restrict__ dz, Acc<T>* __restrict__ sums) {
  sum_elements(work, s, sums, [&](const Position& at) {
    const int64_t i = s.at(at.image, at.channel, at.row, at.column);
    const Acc<T> gradient = widen(y[i]) <= 0 ? Acc<T>(0) : widen(dy[i]);
    dz[i] = narrow<T>(gradient);
    return gradient;
  });
}

}  // namespace alexnet_ext
