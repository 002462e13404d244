// LRN on the device, one element or eight at a time: the CUDA core of every op that normalizes.
//
// Each window sum is computed anew: a running sum would carry an inf, or the rounding of a large value, into all
// channels after it.
#pragma once

#include "../common/channel_blocks.cuh"
#include "local_response_norm.h"

namespace alexnet_ext {

// Lrn as a kernel's argument.
template <class A>
struct DeviceLrn {
  int channels, before, after;
  A mean, factor, beta, k;

  DeviceLrn(const Lrn& lrn, int64_t count)
      : channels(static_cast<int>(count)),
        before(static_cast<int>(lrn.size / 2 < count ? lrn.size / 2 : count)),
        after(static_cast<int>((lrn.size - 1) / 2 < count ? (lrn.size - 1) / 2 : count)),
        mean(static_cast<A>(lrn.alpha / static_cast<double>(lrn.size))),
        factor(static_cast<A>(2 * lrn.alpha * lrn.beta / static_cast<double>(lrn.size))),
        beta(static_cast<A>(lrn.beta)),
        k(static_cast<A>(lrn.k)) {}
};

// ---- any window, any beta: one element, its neighbours read one by one; x(j) and dy(j) are the values of channel j

template <class A>
__device__ inline A power(A s, A beta) {
  const A root = sqrt(s);
  if (beta == A(0.75)) return root * sqrt(root);
  if (beta == A(0.5)) return root;
  if (beta == A(1)) return s;
  return pow(s, beta);
}

template <class A, class X>
__device__ inline A lrn_scale(const DeviceLrn<A>& lrn, int c, X&& x) {
  const int first = c > lrn.before ? c - lrn.before : 0;
  const int last = c + lrn.after < lrn.channels ? c + lrn.after : lrn.channels - 1;
  A sum = 0;
#pragma unroll 1
  for (int j = first; j <= last; ++j) {
    const A v = x(j);
    sum += v * v;
  }
  return lrn.k + lrn.mean * sum;
}

template <class A, class X>
__device__ inline A lrn_value(const DeviceLrn<A>& lrn, int c, X&& x) {
  return x(c) / power(lrn_scale(lrn, c, x), lrn.beta);
}

// ---- the same where the threads of a block have neighbouring channels: they share the terms of their windows

constexpr ChannelWidths kWindowWidths{16, 64};

// The sum of term(j) over the channels j in [c - before, c + after] of this thread's pixel, where c is its own channel.
// The threads of a block store the terms of their own channels in shared memory, then the terms of the channels on both
// sides, `width` at a time. Each adds up its window from there. The before + after terms on the sides are computed
// again by other blocks. Where `inside` is false, terms are 0.
template <class A, class Term>
__device__ inline A window_sum(const ChannelBlocks& work, int channels, int before, int after, bool inside,
                               Term&& term) {
  A* terms = shared_memory<A>();
  const ChannelPlace own(work);
  const int first = own.channel - own.lane, total = work.width + before + after;
  A sum = 0;
  for (int from = 0; from < total; from += work.width) {
    // A ring: the block's own channels, then those after them, then those before them.
    const int place = from + own.lane, j = first + (place < work.width + after ? place : place - total);
    terms[threadIdx.x] = inside && place < total && j >= 0 && j < channels ? term(j) : A(0);
    __syncthreads();
    const auto add = [&](int begin, int end) {
      const int low = begin > from ? begin : from, high = end < from + work.width ? end : from + work.width;
#pragma unroll 1
      for (int k = low; k < high; ++k) sum += terms[own.pixel * own.pixel_step + (k - from) * own.channel_step];
    };
    add(own.lane - before, own.lane + after + 1);
    add(own.lane - before + total, total);
    __syncthreads();
  }
  return sum;
}

// dx of this thread's channel; 0 past the last one. A block computes each channel's scale and term once, with n + 2
// reads.
template <class A, class X, class Dy>
__device__ inline A lrn_gradient(const DeviceLrn<A>& lrn, const ChannelBlocks& work, bool inside, X&& x, Dy&& dy) {
  const int own = ChannelPlace(work).channel;
  A value = 0, scaled = 0;
  // The mirrored window: the outputs whose windows contain the channel.
  const A sum = window_sum<A>(work, lrn.channels, lrn.after, lrn.before, inside, [&](int j) {
    const A dy_j = dy(j), s = lrn_scale(lrn, j, x), x_j = x(j);
    // dy * s^-beta comes first: if s overflowed it is 0, while x * s^-(beta+1) could be inf * 0.
    const A part = dy_j / power(s, lrn.beta);
    if (j == own) value = x_j, scaled = part;
    return part * x_j / s;
  });
  // pow(s, 0) is constant for every s, so no gradient flows through it, not even 0 * inf.
  return lrn.beta == 0 ? scaled : scaled - lrn.factor * value * sum;
}

// ---- n = 3, 5 or 7, beta = 3/4, and s = k + ... at least the smallest normal number: the window in registers

inline bool has_fast_lrn(const Lrn& lrn) {
  return lrn.beta == 0.75 && (lrn.size == 3 || lrn.size == 5 || lrn.size == 7) && lrn.alpha >= 0 && lrn.k >= 0x1p-126;
}

// r = s^-1/2. From it s^-3/4 = r * sqrt(r) and 1/s = r * r: two instructions of the special function unit and no
// division. r is never subnormal, and is 0 for s = inf. rsqrtf(s) would spend three more instructions on subnormal s,
// which .ftz takes for 0.
__device__ inline float inverse_root(float s) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(s));
  return root;
#else
  return 1 / sqrt(s < 0x1p-126f ? 0 : s);
#endif
}

__device__ inline float inverse_three_quarters(float r) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(r));
  return r * root;
#else
  return r * sqrt(r);
#endif
}

// ---- eight channels a lane; the adjacent lanes hold the neighbours

constexpr int kLaneChannels = 8;
// The outer two lanes of a warp only supply neighbours to the others.
constexpr int kOwners = kWarp - 2;
constexpr int kBlockOwners = kBlockThreads / kWarp * kOwners;

inline int64_t lane_blocks(int64_t vectors) {
  const int64_t blocks = ceil_div(vectors, kBlockOwners);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// Calls f(v, owns) for all v < vectors, equally often in all lanes of a warp. This is warp `warp` of `warps`. Lanes
// follow memory order, so that adjacent lanes hold adjacent channels of a pixel. Where `owns` is false f must not
// write.
template <class Index, class F>
__device__ inline void for_lanes(Index vectors, Index warp, Index warps, F&& f) {
  const int lane = threadIdx.x % kWarp;
  for (Index first = warp * kOwners; first < vectors; first += warps * kOwners) {
    const Index v = first + lane - 1;
    const bool owns = lane > 0 && lane < kWarp - 1 && v < vectors;
    f(v < 0 ? 0 : v < vectors ? v : vectors - 1, owns);
  }
}

// The same with all warps of the grid.
template <class Index, class F>
__device__ inline void for_lanes(Index vectors, F&& f) {
  constexpr int kWarps = kBlockThreads / kWarp;
  for_lanes<Index>(vectors, static_cast<Index>(blockIdx.x) * kWarps + static_cast<Index>(threadIdx.x / kWarp),
                   static_cast<Index>(gridDim.x) * kWarps, f);
}

// The window sums of v, by way of the sums of pairs: 27 additions instead of 32 for N = 5. `first` and `last`: the lane
// holds the first or the last channels of its pixel.
template <int N>
__device__ inline void window_sums(float (&sum)[kLaneChannels], const float (&v)[kLaneChannels], bool first,
                                   bool last) {
  constexpr int kHalf = N / 2;
  constexpr unsigned kAll = 0xffffffff;
  float wide[kLaneChannels + 2 * kHalf], pairs[kLaneChannels + 2 * kHalf - 1];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) wide[kHalf + i] = v[i];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float before = __shfl_up_sync(kAll, v[kLaneChannels - kHalf + i], 1);
    const float behind = __shfl_down_sync(kAll, v[i], 1);
    wide[i] = first ? 0 : before;
    wide[kHalf + kLaneChannels + i] = last ? 0 : behind;
  }
#pragma unroll
  for (int i = 0; i + 1 < kLaneChannels + 2 * kHalf; ++i) pairs[i] = wide[i] + wide[i + 1];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    sum[i] = pairs[i];
#pragma unroll
    for (int j = 2; j + 1 < N; j += 2) sum[i] += pairs[i + j];
    sum[i] += wide[i + N - 1];
  }
}

// s^-1/2 for the lane's channels.
template <int N>
__device__ inline void inverse_roots(float (&root)[kLaneChannels], const DeviceLrn<float>& lrn,
                                     const float (&x)[kLaneChannels], bool first, bool last) {
  float squares[kLaneChannels];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) squares[i] = x[i] * x[i];
  window_sums<N>(root, squares, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) root[i] = inverse_root(lrn.k + lrn.mean * root[i]);
}

template <int N>
__device__ inline void lrn_values(float (&y)[kLaneChannels], const DeviceLrn<float>& lrn,
                                  const float (&x)[kLaneChannels], bool first, bool last) {
  float root[kLaneChannels];
  inverse_roots<N>(root, lrn, x, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) y[i] = x[i] * inverse_three_quarters(root[i]);
}

template <int N>
__device__ inline void lrn_gradients(float (&dx)[kLaneChannels], const DeviceLrn<float>& lrn,
                                     const float (&x)[kLaneChannels], const float (&dy)[kLaneChannels], bool first,
                                     bool last) {
  float root[kLaneChannels], scaled[kLaneChannels], terms[kLaneChannels], sum[kLaneChannels];
  inverse_roots<N>(root, lrn, x, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    scaled[i] = dy[i] * inverse_three_quarters(root[i]);
    terms[i] = scaled[i] * x[i] * (root[i] * root[i]);
  }
  window_sums<N>(sum, terms, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) dx[i] = scaled[i] - lrn.factor * x[i] * sum[i];
}

// ---- one pixel a thread; it walks along the channels with its window in registers

// Pixels of [channels][pixels] images. The channels of each are cut into chunks, so that images of few pixels fill a
// GPU.
struct Chunks {
  int64_t pixels;
  int chunks, channels;  // chunks of an image, channels of a chunk
  Divisor by_pixels, by_chunks;

  // About `wanted` chunks an image, but of at least 16 channels each, as the ends of chunks are computed twice.
  Chunks(int64_t pixel_count, int64_t all_channels, int64_t wanted)
      : pixels(pixel_count), by_pixels(pixel_count > 0 ? pixel_count : 1), by_chunks(1) {
    constexpr int64_t kLeast = 16;
    const int64_t most = all_channels < kLeast ? 1 : all_channels / kLeast;
    channels = static_cast<int>(ceil_div(all_channels, wanted < 1 ? 1 : wanted < most ? wanted : most));
    chunks = static_cast<int>(ceil_div(all_channels, channels));
    by_chunks = Divisor(chunks);
  }
};

// Calls f(image, pixel, first channel, end of the channels) for this thread's chunks.
template <class F>
__device__ inline void for_chunks(const Chunks& work, int64_t threads, int channels, F&& f) {
  for_each(threads, [&](int64_t t) {
    const int64_t unit = work.by_pixels.divide(t), image = work.by_chunks.divide(unit);
    const int first = static_cast<int>(unit - image * work.chunks) * work.channels;
    f(image, t - unit * work.pixels, first, first + work.channels < channels ? first + work.channels : channels);
  });
}

// The last N values seen.
template <int N>
struct Window {
  float values[N] = {};

  __device__ void push(float v) {
#pragma unroll
    for (int i = 0; i + 1 < N; ++i) values[i] = values[i + 1];
    values[N - 1] = v;
  }

  __device__ float sum() const {
    float total = values[0];
#pragma unroll
    for (int i = 1; i < N; ++i) total += values[i];
    return total;
  }

  __device__ float sum_of_squares() const {
    float total = values[0] * values[0];
#pragma unroll
    for (int i = 1; i < N; ++i) total += values[i] * values[i];
    return total;
  }
};

// LRN of one pixel, channel after channel.
template <int N>
struct ValueWalk {
  static constexpr int kDelay = N / 2;  // channels between a value and its result
  Window<N> inputs;

  // Takes x of channel c, 0 outside the channels. Gives y of channel c - kDelay.
  __device__ float push(const DeviceLrn<float>& lrn, float x) {
    inputs.push(x);
    const float root = inverse_root(lrn.k + lrn.mean * inputs.sum_of_squares());
    return input() * inverse_three_quarters(root);
  }

  // x of the result.
  __device__ float input() const { return inputs.values[N / 2]; }
};

// Its gradient.
template <int N>
struct GradientWalk {
  static constexpr int kHalf = N / 2, kDelay = 2 * kHalf;
  Window<N> inputs, terms;
  Window<kHalf + 1> gradients, scaled;

  // Takes x and dy of channel c, 0 outside the channels. Gives dx of channel c - kDelay. `inside`: c - kHalf is a
  // channel. If it is not, its term is 0. Computed, 0 * s^-beta could be NaN.
  __device__ float push(const DeviceLrn<float>& lrn, float x, float dy, bool inside) {
    inputs.push(x);
    gradients.push(dy);
    const float root = inverse_root(lrn.k + lrn.mean * inputs.sum_of_squares());
    const float value = inside ? gradients.values[0] * inverse_three_quarters(root) : 0.0f;
    scaled.push(value);
    terms.push(inside ? value * inputs.values[kHalf] * (root * root) : 0.0f);
    return scaled.values[0] - lrn.factor * input() * terms.sum();
  }

  // x of the result.
  __device__ float input() const { return inputs.values[0]; }
};

// Calls f(c, whole) for the runs [c, c + kRun) of channels that a walk takes for the results [first, end), which come
// kDelay channels later. The loads of a run are in flight together. `whole`: all its channels and results are wanted,
// as in most runs. These are compiled without the checks of each.
template <int kRun, int kDelay, class F>
__device__ inline void for_runs(int channels, int first, int end, F&& f) {
  for (int c = first - kDelay; c < end + kDelay; c += kRun) {
    if (c - kDelay >= first && c - kDelay + kRun <= end && c + kRun <= channels)
      f(c, Constant<true>{});
    else
      f(c, Constant<false>{});
  }
}

// What a run must check of each channel.
struct Wanted {
  int channels, first, end;

  template <class Whole>
  __device__ bool channel(Whole, int c) const {
    return Whole::value || (c >= 0 && c < channels);
  }

  template <class Whole>
  __device__ bool result(Whole, int c) const {
    return Whole::value || (c >= first && c < end);
  }
};

// A pixel's elements, channel after channel.
template <class T>
struct Channels {
  T* all;
  int place, step;

  __device__ T* at(int offset = 0) const { return all + (place + offset); }

  __device__ void next() { place += step; }

  // The element, or 0 if it is not wanted. Goes on to the next.
  __device__ float take(bool wanted) {
    const float value = wanted ? widen(*at()) : 0.0f;
    next();
    return value;
  }
};

}  // namespace alexnet_ext
