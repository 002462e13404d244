// CaffeNet's block on CUDA: bias, ReLU, pooling and LRN of x in one kernel, and its backward in another.
//
// Channels-last with AlexNet's LRN, a lane holds eight channels and finds their neighbours in the lanes beside it.
// Bytes forward: x once, y, pooled and winners (each a quarter of x or less, at 3/2) once. Backward: dy, pooled and
// winners once from memory, as an input's windows overlap in L1 and L2, dx once, and the bias sums.
#pragma once

#include "../relu_lrn_max_pool2d/block_window.cuh"
#include "relu_max_pool2d_lrn.h"

namespace alexnet_ext {

// ---- channels-last: lanes of eight channels

template <class T, int N, int K>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_lanes_kernel(DeviceBlock<float> p, int64_t vectors, const T* __restrict__ x,
                                     const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ pooled,
                                     uint8_t* __restrict__ winners) {
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const Lane lane(p.lanes, v);
    const Position at = p.out.position(v * kLaneChannels);
    const T* from = x + p.in.at(at.image, lane.channel, 0, 0);
    Best<float, kLaneChannels> best;
    for_taps<K>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
      float values[kLaneChannels];
      load<kLaneChannels>(values, from + ih * p.in.row_step + iw * p.in.column_step);
      add_bias(values, bias, lane.channel);
      best.template take<true>(values, tap);
    });
    float normalized[kLaneChannels];
    lrn_values<N>(normalized, p.lrn, best.value, lane.first, lane.last);
    if (!owns) return;
    store<kLaneChannels>(y + v * kLaneChannels, normalized);
    store<kLaneChannels>(pooled + v * kLaneChannels, best.value);
    store_bytes<kLaneChannels>(winners + v * kLaneChannels, best.tap);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, 3)  // 85 registers
    relu_max_pool2d_lrn_lanes_backward_kernel(DeviceBlock<float> p, int64_t vectors, const T* __restrict__ dy,
                                              const T* __restrict__ pooled, const uint8_t* __restrict__ winners,
                                              T* __restrict__ dx, float* __restrict__ sums) {
  float sum[kLaneChannels] = {};
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const Lane lane(p.lanes, v);
    const Position at = p.in.position(v * kLaneChannels);
    const int64_t base = p.out.at(at.image, lane.channel, 0, 0);
    float out[kLaneChannels] = {};
    for_windows(p.pool, p.out, at.row, at.column, [&](int oh, int ow, int tap) {
      if (__ballot_sync(0xffffffff, tap >= 0) == 0) return;
      // All lanes, as they exchange values; those whose window does not exist with zeros.
      float values[kLaneChannels] = {}, gradient[kLaneChannels] = {}, dpooled[kLaneChannels];
      Bytes<kLaneChannels> won = 0;
      if (tap >= 0) {
        const int64_t from = base + oh * p.out.row_step + ow * p.out.column_step;
        load<kLaneChannels>(values, pooled + from);
        load<kLaneChannels>(gradient, dy + from);
        won = load_bytes<kLaneChannels>(winners + from);
      }
      lrn_gradients<N>(dpooled, p.lrn, values, gradient, lane.first, lane.last);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i)
        if (tap >= 0 && byte_of<kLaneChannels>(won, i) == tap) out[i] += dpooled[i];
    });
    if (!owns) return;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) sum[i] += out[i];
    store<kLaneChannels>(dx + v * kLaneChannels, out);
  });
  sum_vectors<kLaneChannels, kOwners>(sum, p.lanes, sums);
}

// ---- any layout, window and beta: element by element

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_kernel(DeviceBlock<Acc<T>> p, int64_t n, const T* __restrict__ x, const T* __restrict__ bias,
                               T* __restrict__ y, T* __restrict__ pooled, uint8_t* __restrict__ winners) {
  for_each(n, [&](int64_t i) {
    const Position at = p.out.position(i);
    const auto best = [&](int j) {
      Best<Acc<T>, 1> found;
      for_taps<0>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
        const Acc<T> values[] = {with_bias(widen(x[p.in.at(at.image, j, ih, iw)]), bias, j)};
        found.template take<true>(values, tap);
      });
      return found;
    };
    y[i] = narrow<T>(lrn_value(p.lrn, at.channel, [&](int j) { return best(j).value[0]; }));
    const Best<Acc<T>, 1> own = best(at.channel);
    store<1>(pooled + i, own.value);
    store_bytes<1>(winners + i, own.tap);
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_backward_kernel(DeviceBlock<Acc<T>> p, ChannelBlocks work, const T* __restrict__ dy,
                                        const T* __restrict__ pooled, const uint8_t* __restrict__ winners,
                                        T* __restrict__ dx, Acc<T>* __restrict__ sums) {
  sum_elements(work, p.in, sums, [&](const Position& at) {
    Acc<T> out = 0;
    for_windows(p.pool, p.out, at.row, at.column, [&](int oh, int ow, int tap) {
      if (tap < 0 || winners[p.out.at(at.image, at.channel, oh, ow)] != tap) return;
      const int64_t base = p.out.at(at.image, 0, oh, ow);
      const auto value = [&](int j) { return widen(pooled[base + j * p.out.channel_step]); };
      const auto gradient = [&](int j) { return widen(dy[base + j * p.out.channel_step]); };
      out += lrn_gradient(p.lrn, at.channel, value, gradient);
    });
    dx[p.in.at(at.image, at.channel, at.row, at.column)] = narrow<T>(out);
    return out;
  });
}

}  // namespace alexnet_ext
