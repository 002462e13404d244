// LRN on CUDA, in three ways:
//   lanes     channels-last: the lanes of a warp hold neighbouring channels
//   pixels    contiguous: lanes run along the pixels, and each keeps its window in registers
//   general   any strides, window and beta: element by element, backward through shared memory
// Bytes: forward reads x once and writes y once; backward reads x and dy once and writes dx once. Lanes read 2 of 30
// vectors again, and chunks of channels their ends. The general kernels find neighbours in the caches.
#pragma once

#include "local_response_norm_window.cuh"

namespace alexnet_ext {

// ---- channels-last: lanes of eight channels, counted in 32 bits

// A launch's most vectors: the step of the largest grid may be added to them.
constexpr int64_t kMaxVectors = 1 << 30;
static_assert(kMaxVectors + kMaxBlocks * kBlockOwners <= INT32_MAX);

// Calls f(offset, lane is the pixel's first, lane is its last, owns) for all vectors, as for_lanes does.
template <class F>
__device__ inline void for_pixel_lanes(const Divisor& lanes, int vectors, F&& f) {
  const int count = static_cast<int>(lanes.value);
  for_lanes(vectors, [&](int v, bool owns) {
    const int lane = v - lanes.divide(v) * count;
    f(static_cast<int64_t>(v) * kLaneChannels, lane == 0, lane == count - 1, owns);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_lanes_kernel(DeviceLrn<float> lrn, Divisor lanes, int vectors, const T* __restrict__ x,
                                     T* __restrict__ y) {
  for_pixel_lanes(lanes, vectors, [&](int64_t at, bool first, bool last, bool owns) {
    float in[kLaneChannels], out[kLaneChannels];
    load<kLaneChannels>(in, x + at);
    lrn_values<N>(out, lrn, in, first, last);
    if (owns) store<kLaneChannels>(y + at, out);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_lanes_backward_kernel(DeviceLrn<float> lrn, Divisor lanes, int vectors,
                                              const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx) {
  for_pixel_lanes(lanes, vectors, [&](int64_t at, bool first, bool last, bool owns) {
    float in[kLaneChannels], gradient[kLaneChannels], out[kLaneChannels];
    load<kLaneChannels>(in, x + at);
    load<kLaneChannels>(gradient, dy + at);
    lrn_gradients<N>(out, lrn, in, gradient, first, last);
    if (owns) store<kLaneChannels>(dx + at, out);
  });
}

// ---- contiguous: a thread walks a chunk of one pixel's channels

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_pixels_kernel(DeviceLrn<float> lrn, Chunks work, int64_t threads, int64_t image_step,
                                      const T* __restrict__ x, T* __restrict__ y) {
  constexpr int kRun = 8, kDelay = ValueWalk<N>::kDelay;
  const int step = static_cast<int>(work.pixels);
  for_chunks(work, threads, lrn.channels, [&](int64_t image, int64_t pixel, int first, int end) {
    const int64_t at = image * image_step + pixel;
    Channels<const T> from{x + at, (first - kDelay) * step, step};
    Channels<T> to{y + at, first * step, step};
    ValueWalk<N> walk;
    const Wanted wanted{lrn.channels, first, end};
    for_runs<kRun, kDelay>(lrn.channels, first, end, [&](int c, auto whole) {
      float in[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) in[j] = from.take(wanted.channel(whole, c + j));
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float out = walk.push(lrn, in[j]);
        if (wanted.result(whole, c + j - kDelay)) *to.at() = narrow<T>(out), to.next();
      }
    });
  });
}

// A window of seven needs more than 64 registers: for compute capability 10.0 it would spill.
template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, N > 5 ? 3 : kBlocksPerProcessor)
    local_response_norm_pixels_backward_kernel(DeviceLrn<float> lrn, Chunks work, int64_t threads, int64_t image_step,
                                               const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx) {
  constexpr int kRun = 4, kDelay = GradientWalk<N>::kDelay;
  const int step = static_cast<int>(work.pixels);
  for_chunks(work, threads, lrn.channels, [&](int64_t image, int64_t pixel, int first, int end) {
    const int64_t at = image * image_step + pixel;
    const int ahead = (first - kDelay) * step;
    Channels<const T> values{x + at, ahead, step}, gradients{dy + at, ahead, step};
    Channels<T> to{dx + at, first * step, step};
    GradientWalk<N> walk;
    const Wanted wanted{lrn.channels, first, end};
    for_runs<kRun, kDelay>(lrn.channels, first, end, [&](int c, auto whole) {
      float in[kRun], gradient[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        in[j] = values.take(wanted.channel(whole, c + j));
        gradient[j] = gradients.take(wanted.channel(whole, c + j));
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float out = walk.push(lrn, in[j], gradient[j], wanted.channel(whole, c + j - N / 2));
        if (wanted.result(whole, c + j - kDelay)) *to.at() = narrow<T>(out), to.next();
      }
    });
  });
}

// ---- any strides

struct Pixels {
  int64_t batch_step, channel_step, pixel_step, n;
  bool channels_first;  // in memory the channel varies more slowly than the pixel
  Divisor by_channels, by_pixels;
};

// Calls f(offset of the pixel's channel 0, channel) for this thread's elements.
template <class F>
__device__ inline void for_elements(const Pixels& work, F&& f) {
  for_each(work.n, [&](int64_t i) {
    int64_t unit = work.channels_first ? work.by_pixels.divide(i) : work.by_channels.divide(i);
    int64_t inner = i - unit * (work.channels_first ? work.by_pixels.value : work.by_channels.value);
    const int64_t image = work.channels_first ? work.by_channels.divide(unit) : work.by_pixels.divide(unit);
    unit -= image * (work.channels_first ? work.by_channels.value : work.by_pixels.value);
    const int64_t pixel = work.channels_first ? inner : unit, channel = work.channels_first ? unit : inner;
    f(image * work.batch_step + pixel * work.pixel_step, static_cast<int>(channel));
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_kernel(DeviceLrn<Acc<T>> lrn, Pixels work, const T* __restrict__ x, T* __restrict__ y) {
  for_elements(work, [&](int64_t at, int channel) {
    const auto in = [&](int j) { return widen(x[at + j * work.channel_step]); };
    y[at + channel * work.channel_step] = narrow<T>(lrn_value(lrn, channel, in));
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_backward_kernel(DeviceLrn<Acc<T>> lrn, Pixels work, ChannelBlocks blocks,
                                        const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx) {
  const int channel = ChannelPlace(blocks).channel;
  for_pixels(blocks, [&](int64_t pixel, bool inside) {
    const int64_t image = work.by_pixels.divide(pixel);
    const int64_t at = image * work.batch_step + (pixel - image * work.by_pixels.value) * work.pixel_step;
    const auto in = [&](int j) { return widen(x[at + j * work.channel_step]); };
    const auto gradient = [&](int j) { return widen(dy[at + j * work.channel_step]); };
    const Acc<T> out = lrn_gradient(lrn, blocks, inside, in, gradient);
    if (inside && channel < lrn.channels) dx[at + channel * work.channel_step] = narrow<T>(out);
  });
}

}  // namespace alexnet_ext
