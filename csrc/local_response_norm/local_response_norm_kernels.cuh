// LRN on CUDA, three ways: channels-last, a warp holding neighbouring channels; contiguous, lanes along the pixels and
// the window in registers; and any strides, window and beta, element by element.
// Bytes: forward x once and y once; backward x, dy and dx once. (Lanes re-read 2 in 30 vectors, chunks of channels
// their ends; the general kernels find their neighbours in the caches.)
#pragma once

#include "local_response_norm_window.cuh"

namespace alexnet_ext {

// ---- channels-last: lanes of eight channels

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_lanes_kernel(DeviceLrn<float> lrn, Divisor lanes, int64_t vectors, const T* __restrict__ x,
                                     T* __restrict__ y) {
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const int64_t channel = v - lanes.divide(v) * lanes.value;
    float in[kLaneChannels], out[kLaneChannels];
    load<kLaneChannels>(in, x + v * kLaneChannels);
    lrn_values<N>(out, lrn, in, channel == 0, channel == lanes.value - 1);
    if (owns) store<kLaneChannels>(y + v * kLaneChannels, out);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_lanes_backward_kernel(DeviceLrn<float> lrn, Divisor lanes, int64_t vectors,
                                              const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx) {
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const int64_t channel = v - lanes.divide(v) * lanes.value;
    float in[kLaneChannels], gradient[kLaneChannels], out[kLaneChannels];
    load<kLaneChannels>(in, x + v * kLaneChannels);
    load<kLaneChannels>(gradient, dy + v * kLaneChannels);
    lrn_gradients<N>(out, lrn, in, gradient, channel == 0, channel == lanes.value - 1);
    if (owns) store<kLaneChannels>(dx + v * kLaneChannels, out);
  });
}

// ---- contiguous: a thread walks a chunk of one pixel's channels

// The work: thread t does chunk t / pixels % chunks of pixel t % pixels of image t / pixels / chunks.
struct Chunks {
  int64_t pixels, image_step, threads;
  int chunks, channels;  // chunks an image, channels a chunk
  Divisor by_pixels, by_chunks;
};

// f(where the pixel's channels start, first channel, end) for this thread's chunks.
template <class F>
__device__ inline void for_chunks(const Chunks& work, int all_channels, F&& f) {
  for_each(work.threads, [&](int64_t t) {
    const int64_t unit = work.by_pixels.divide(t), image = work.by_chunks.divide(unit);
    const int first = static_cast<int>(unit - image * work.chunks) * work.channels;
    const int end = first + work.channels < all_channels ? first + work.channels : all_channels;
    f(image * work.image_step + (t - unit * work.pixels), first, end);
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
};

// values[j] = channel c + j, 0 outside of the pixel's channels: loads that a thread has in flight together.
template <int kAhead, class T>
__device__ inline void load_ahead(float (&values)[kAhead], const T* from, int64_t step, int c, int channels) {
#pragma unroll
  for (int j = 0; j < kAhead; ++j) values[j] = c + j >= 0 && c + j < channels ? widen(from[(c + j) * step]) : 0.0f;
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_pixels_kernel(DeviceLrn<float> lrn, Chunks work, const T* __restrict__ x, T* __restrict__ y) {
  constexpr int kHalf = N / 2, kAhead = 8;
  for_chunks(work, lrn.channels, [&](int64_t at, int first, int end) {
    Window<N> squares;
    Window<kHalf + 1> inputs;  // the oldest stands at the middle of the window
    for (int c = first - kHalf; c < end + kHalf; c += kAhead) {
      float ahead[kAhead];
      load_ahead(ahead, x + at, work.pixels, c, lrn.channels);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        squares.push(ahead[j] * ahead[j]);
        inputs.push(ahead[j]);
        const int out = c + j - kHalf;
        if (out < first || out >= end) continue;
        const float root = inverse_root(lrn.k + lrn.mean * squares.sum());
        y[at + out * work.pixels] = narrow<T>(inputs.values[0] * inverse_three_quarters(root));
      }
    }
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_pixels_backward_kernel(DeviceLrn<float> lrn, Chunks work, const T* __restrict__ dy,
                                               const T* __restrict__ x, T* __restrict__ dx) {
  constexpr int kHalf = N / 2, kAhead = 4;
  for_chunks(work, lrn.channels, [&](int64_t at, int first, int end) {
    Window<N> squares, terms;
    Window<2 * kHalf + 1> inputs;  // the middle one belongs to the newest term, the oldest to the output
    Window<kHalf + 1> gradients, scaled;
    for (int c = first - 2 * kHalf; c < end + 2 * kHalf; c += kAhead) {
      float ahead[kAhead], gradients_ahead[kAhead];
      load_ahead(ahead, x + at, work.pixels, c, lrn.channels);
      load_ahead(gradients_ahead, dy + at, work.pixels, c, lrn.channels);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        squares.push(ahead[j] * ahead[j]);
        inputs.push(ahead[j]);
        gradients.push(gradients_ahead[j]);
        const int middle = c + j - kHalf, out = middle - kHalf;
        const float root = inverse_root(lrn.k + lrn.mean * squares.sum());
        // Outside of the channels there is no term; its 0 * s^-beta could be NaN.
        const bool inside = middle >= 0 && middle < lrn.channels;
        const float value = inside ? gradients.values[0] * inverse_three_quarters(root) : 0.0f;
        scaled.push(value);
        terms.push(inside ? value * inputs.values[kHalf] * (root * root) : 0.0f);
        if (out < first || out >= end) continue;
        dx[at + out * work.pixels] = narrow<T>(scaled.values[0] - lrn.factor * inputs.values[0] * terms.sum());
      }
    }
  });
}

// ---- any strides

struct Pixels {
  int64_t batch_step, channel_step, pixel_step, n;
  bool channels_first;  // in memory order the channel moves slower than the pixel
  Divisor by_channels, by_pixels;
};

// f(where the pixel's channels start, channel) for this thread's elements.
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
    local_response_norm_backward_kernel(DeviceLrn<Acc<T>> lrn, Pixels work, const T* __restrict__ dy,
                                        const T* __restrict__ x, T* __restrict__ dx) {
  for_elements(work, [&](int64_t at, int channel) {
    const auto in = [&](int j) { return widen(x[at + j * work.channel_step]); };
    const auto gradient = [&](int j) { return widen(dy[at + j * work.channel_step]); };
    dx[at + channel * work.channel_step] = narrow<T>(lrn_gradient(lrn, channel, in, gradient));
  });
}

}  // namespace alexnet_ext
