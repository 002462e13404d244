// The paper's block on CUDA: bias, ReLU, LRN and pooling of x in one kernel, and its backward in another.
//
// Channels-last with AlexNet's LRN, a lane holds eight channels and finds their neighbours in the lanes beside it.
// Bytes forward: x once, y and winners (a quarter of it at 3/2) once; an input that several windows see comes from L1
// or L2, and is normalized again for each of them. Backward: x, dy and winners once, dx once, and the bias sums.
#pragma once

#include "block_window.cuh"

namespace alexnet_ext {

// ---- channels-last: lanes of eight channels

template <class T, int N, int K>
__global__ void __launch_bounds__(kBlockThreads, 3)  // 85 registers
    relu_lrn_max_pool2d_lanes_kernel(DeviceBlock<float> p, int64_t vectors, const T* __restrict__ x,
                                     const T* __restrict__ bias, T* __restrict__ y, uint8_t* __restrict__ winners) {
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const Lane lane(p.lanes, v);
    const Position at = p.out.position(v * kLaneChannels);
    const T* from = x + p.in.at(at.image, lane.channel, 0, 0);
    Best<float, kLaneChannels> best;
    for_taps<K>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
      float values[kLaneChannels], normalized[kLaneChannels];
      load<kLaneChannels>(values, from + ih * p.in.row_step + iw * p.in.column_step);
      add_bias(values, bias, lane.channel);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) values[i] = relu(values[i]);
      lrn_values<N>(normalized, p.lrn, values, lane.first, lane.last);
      best.template take<false>(normalized, tap);
    });
    if (!owns) return;
    store<kLaneChannels>(y + v * kLaneChannels, best.value);
    store_bytes<kLaneChannels>(winners + v * kLaneChannels, best.tap);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_lrn_max_pool2d_lanes_backward_kernel(DeviceBlock<float> p, int64_t vectors, const T* __restrict__ dy,
                                              const T* __restrict__ x, const T* __restrict__ bias,
                                              const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                              float* __restrict__ sums) {
  float sum[kLaneChannels] = {};
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const Lane lane(p.lanes, v);
    float values[kLaneChannels], gradient[kLaneChannels], out[kLaneChannels];
    load<kLaneChannels>(values, x + v * kLaneChannels);
    add_bias(values, bias, lane.channel);
    gather<kLaneChannels>(gradient, p.pool, p.out, p.in.position(v * kLaneChannels), dy, winners);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) values[i] = relu(values[i]);
    lrn_gradients<N>(out, p.lrn, values, gradient, lane.first, lane.last);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      if (values[i] <= 0) out[i] = 0;
      if (owns) sum[i] += out[i];
    }
    if (owns) store<kLaneChannels>(dx + v * kLaneChannels, out);
  });
  sum_vectors<kLaneChannels, kOwners>(sum, p.lanes, sums);
}

// ---- any layout, window and beta: element by element

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_lrn_max_pool2d_kernel(DeviceBlock<Acc<T>> p, int64_t n, const T* __restrict__ x, const T* __restrict__ bias,
                               T* __restrict__ y, uint8_t* __restrict__ winners) {
  for_each(n, [&](int64_t i) {
    const Position at = p.out.position(i);
    Best<Acc<T>, 1> best;
    for_taps<0>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
      const T* from = x + p.in.at(at.image, 0, ih, iw);
      const auto activation = [&](int j) { return relu(with_bias(widen(from[j * p.in.channel_step]), bias, j)); };
      const Acc<T> values[] = {lrn_value(p.lrn, at.channel, activation)};
      best.template take<false>(values, tap);
    });
    store<1>(y + i, best.value);
    store_bytes<1>(winners + i, best.tap);
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_lrn_max_pool2d_backward_kernel(DeviceBlock<Acc<T>> p, ChannelBlocks work, const T* __restrict__ dy,
                                        const T* __restrict__ x, const T* __restrict__ bias,
                                        const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                        Acc<T>* __restrict__ sums) {
  sum_elements(work, p.in, sums, [&](const Position& at) {
    const int64_t base = p.in.at(at.image, 0, at.row, at.column);
    const auto activation = [&](int j) { return relu(with_bias(widen(x[base + j * p.in.channel_step]), bias, j)); };
    const auto gradient = [&](int j) {
      Acc<T> won[1];
      gather<1>(won, p.pool, p.out, {at.image, j, at.row, at.column}, dy, winners);
      return won[0];
    };
    const Acc<T> out = activation(at.channel) <= 0 ? Acc<T>(0) : lrn_gradient(p.lrn, at.channel, activation, gradient);
    dx[base + at.channel * p.in.channel_step] = narrow<T>(out);
    return out;
  });
}

}  // namespace alexnet_ext
