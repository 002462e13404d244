// ReLU + max pooling on CUDA: a thread computes V neighbouring channels of one output (forward) or input (backward).
// Bytes: forward reads x from memory once, as overlapping windows find it in L1 and L2, and writes y and one byte a
// value. Backward reads dy and winners in the same way, writes dx once, and adds in one fixed order.
#pragma once

#include "relu_max_pool2d_window.cuh"

namespace alexnet_ext {

template <class T, int V, int K>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_kernel(DevicePooling pool, DeviceImages in, DeviceImages out, int64_t n, const T* __restrict__ x,
                           T* __restrict__ y, uint8_t* __restrict__ winners) {
  for_each(n / V, [&](int64_t i) {
    const Position at = out.position(i * V);
    const T* from = x + in.at(at.image, at.channel, 0, 0);
    Best<Acc<T>, V> best;
    for_taps<K>(pool, in, at.row, at.column, [&](int ih, int iw, int tap) {
      Acc<T> values[V];
      load<V>(values, from + ih * in.row_step + iw * in.column_step);
      best.template take<true>(values, tap);
    });
    store<V>(y + i * V, best.value);
    store_bytes<V>(winners + i * V, best.tap);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_backward_kernel(DevicePooling pool, DeviceImages in, DeviceImages out, int64_t n,
                                    const T* __restrict__ dy, const uint8_t* __restrict__ winners, T* __restrict__ dx) {
  for_each(n / V, [&](int64_t i) {
    Acc<T> sum[V];
    gather<V>(sum, pool, out, in.position(i * V), dy, winners);
    store<V>(dx + i * V, sum);
  });
}

}  // namespace alexnet_ext
