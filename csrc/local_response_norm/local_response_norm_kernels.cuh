// LRN on CUDA, a first form: a thread walks the channels of one pixel, so neighbouring threads read neighbouring pixels
// of contiguous tensors. Each window is read afresh (through the caches), never kept as a running sum.
// Bytes: x read once from memory and y written once; the window's other reads hit L1/L2.
#pragma once

#include "../common/launch.cuh"
#include "local_response_norm.h"

namespace alexnet_ext {

// s^beta; square roots where they do.
template <class A>
__device__ A power(A s, A beta) {
  A root = sqrt(s);
  if (beta == A(0.75)) return root * sqrt(root);
  if (beta == A(0.5)) return root;
  if (beta == A(1)) return s;
  return pow(s, beta);
}

// A pixel's channels: element c of tensor t is t[c * stride].
template <class T>
struct Channels {
  using A = Acc<T>;
  int64_t count, stride, before, after;
  A mean, k, beta;

  __device__ explicit Channels(const LocalResponseNorm& p)
      : count(p.channels),
        stride(p.channel_stride),
        before(p.lrn.size / 2),
        after((p.lrn.size - 1) / 2),
        mean(static_cast<A>(p.lrn.alpha / static_cast<double>(p.lrn.size))),
        k(static_cast<A>(p.lrn.k)),
        beta(static_cast<A>(p.lrn.beta)) {}

  __device__ A scale(const T* x, int64_t c) const {
    int64_t first = c > before ? c - before : 0, last = c + after < count ? c + after : count - 1;
    A sum = 0;
    for (int64_t j = first; j <= last; ++j) {
      A v = widen(x[j * stride]);
      sum += v * v;
    }
    return k + mean * sum;
  }
};

template <class F>
__device__ void for_pixels(const LocalResponseNorm& p, F&& f) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.batch * p.pixels; i += threads)
    f(i / p.pixels * p.batch_stride + i % p.pixels * p.pixel_stride);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    local_response_norm_kernel(LocalResponseNorm p, const T* __restrict__ x, T* __restrict__ y) {
  const Channels<T> channels(p);
  for_pixels(p, [&](int64_t at) {
    for (int64_t c = 0; c < channels.count; ++c) {
      int64_t i = at + c * channels.stride;
      y[i] = narrow<T>(widen(x[i]) / power(channels.scale(x + at, c), channels.beta));
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    local_response_norm_backward_kernel(LocalResponseNorm p, const T* __restrict__ dy, const T* __restrict__ x,
                                        T* __restrict__ dx) {
  using A = Acc<T>;
  const Channels<T> channels(p);
  const A factor = static_cast<A>(2 * p.lrn.alpha * p.lrn.beta / static_cast<double>(p.lrn.size));
  for_pixels(p, [&](int64_t at) {
    for (int64_t c = 0; c < channels.count; ++c) {
      // The mirrored window: the outputs whose window holds channel c.
      int64_t first = c > channels.after ? c - channels.after : 0;
      int64_t last = c + channels.before < channels.count ? c + channels.before : channels.count - 1;
      A sum = 0, own = 0;
      for (int64_t j = first; j <= last; ++j) {
        A s = channels.scale(x + at, j);
        // dy * s^-beta first: where s overflowed it is 0, and x * s^-(beta+1) alone would be inf * 0.
        A scaled = widen(dy[at + j * channels.stride]) / power(s, channels.beta);
        sum += scaled * widen(x[at + j * channels.stride]) / s;
        if (j == c) own = scaled;
      }
      int64_t i = at + c * channels.stride;
      dx[i] = narrow<T>(channels.beta == 0 ? own : own - factor * widen(x[i]) * sum);
    }
  });
}

}  // namespace alexnet_ext
