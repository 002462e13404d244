// What the CUDA kernels of both fused blocks share: their parameters, the activation, and the bias gradient.
#pragma once

#include "../common/channel_sums.cuh"
#include "../local_response_norm/local_response_norm_window.cuh"
#include "../relu_max_pool2d/relu_max_pool2d_window.cuh"
#include "relu_lrn_max_pool2d.h"

namespace alexnet_ext {

// LrnPoolBlock as kernels take it.
template <class A>
struct DeviceBlock {
  DeviceLrn<A> lrn;
  DevicePooling pool;
  DeviceImages in, out;
  Divisor lanes;  // of eight channels

  explicit DeviceBlock(const LrnPoolBlock& p)
      : lrn(p.lrn, p.in.channels),
        pool(p.pool),
        in(p.in),
        out(p.out),
        lanes(p.in.channels < kLaneChannels ? 1 : p.in.channels / kLaneChannels) {}
};

// Whether lanes of eight channels do it: AlexNet's LRN, channels-last.
inline bool has_lanes(const LrnPoolBlock& p, bool aligned) {
  return p.dtype != DType::f64 && p.lrn.size == 5 && has_fast_lrn(p.lrn) && p.in.channels_last &&
         p.in.channels % kLaneChannels == 0 && p.in.channels <= kMaxLaneSums && aligned;
}

// Written as !(v <= 0) so that NaN stays.
template <class A>
__device__ inline A relu(A v) {
  return v <= 0 ? A(0) : v;
}

template <class A, class T>
__device__ inline A with_bias(A v, const T* __restrict__ bias, int channel) {
  return bias == nullptr ? v : v + widen(bias[channel]);
}

template <class T>
__device__ inline void add_bias(float (&values)[kLaneChannels], const T* __restrict__ bias, int channel) {
  if (bias == nullptr) return;
  float b[kLaneChannels];
  load<kLaneChannels>(b, bias + channel);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) values[i] += b[i];
}

// A lane's first channel, and whether its pixel has channels before and behind its eight.
struct Lane {
  int channel;
  bool first, last;

  __device__ Lane(const Divisor& lanes, int64_t v) {
    const int lane = static_cast<int>(v - lanes.divide(v) * lanes.value);
    channel = lane * kLaneChannels;
    first = lane == 0;
    last = lane == lanes.value - 1;
  }
};

}  // namespace alexnet_ext
