// LRN on CUDA, three ways: channels-last, a warp holding neighbouring channels; contiguous, lanes along the pixels and
// the window in registers; and any strides, window and beta, element by element, backward by way of shared memory.
// Bytes: forward x once and y once; backward x, dy and dx once. (Lanes re-read 2 in 30 vectors, chunks and tiles of
// channels their ends; the general kernels find their neighbours in the caches.)
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

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_pixels_kernel(DeviceLrn<float> lrn, Chunks work, int64_t threads, int64_t image_step,
                                      const T* __restrict__ x, T* __restrict__ y) {
  for_chunks(work, threads, lrn.channels, [&](int64_t image, int64_t pixel, int first, int end) {
    const int64_t at = image * image_step + pixel;
    walk_values<N, 8>(
        lrn, first, end, [&](auto& in, int c) { load_run(in, x + at, work.pixels, c, lrn.channels); },
        [&](int, int c, float value) { y[at + c * work.pixels] = narrow<T>(value); }, [](int) {});
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_pixels_backward_kernel(DeviceLrn<float> lrn, Chunks work, int64_t threads, int64_t image_step,
                                               const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx) {
  for_chunks(work, threads, lrn.channels, [&](int64_t image, int64_t pixel, int first, int end) {
    const int64_t at = image * image_step + pixel;
    walk_gradients<N, 4>(
        lrn, first, end,
        [&](auto& in, auto& gradient, int c) {
          load_run(in, x + at, work.pixels, c, lrn.channels);
          load_run(gradient, dy + at, work.pixels, c, lrn.channels);
        },
        [&](int, int c, float, float value) { dx[at + c * work.pixels] = narrow<T>(value); }, [](int) {});
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

// Tiles of kBlockThreads elements, `width` channels of each of some pixels, neighbours in memory side by side.
struct Patches {
  int width, shift;  // 1 << shift is the width
  Divisor by_columns;
  int64_t pixels, count;  // of all images; how many tiles

  Patches(const LocalResponseNorm& p, int most) : width(1), shift(0), by_columns(1), pixels(p.batch * p.pixels) {
    while (width < most && width < p.channels) width = 1 << ++shift;
    by_columns = Divisor(ceil_div(p.channels, width));
    count = ceil_div(pixels, kBlockThreads / width) * by_columns.value;
  }
};

// Each element's scale and term are computed once a tile, n reads, and summed up from shared memory, n more; terms of
// the neighbouring tiles, n - 1 beside `width`, are computed once more.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    local_response_norm_backward_kernel(DeviceLrn<Acc<T>> lrn, Pixels work, Patches tiles, const T* __restrict__ dy,
                                        const T* __restrict__ x, T* __restrict__ dx) {
  using A = Acc<T>;
  A *terms = shared_memory<A>(), *scaled = terms + kBlockThreads;
  const int high = kBlockThreads >> tiles.shift, thread = threadIdx.x;
  const int lane = work.channels_first ? thread / high : thread & (tiles.width - 1);  // this thread's channel in a tile
  const int step = work.channels_first ? high : 1;                                    // from a channel to the next
  const int start = thread - lane * step;
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int64_t row = tiles.by_columns.divide(tile);
    const int first = static_cast<int>(tile - row * tiles.by_columns.value) * tiles.width, channel = first + lane;
    const int64_t pixel = row * high + (work.channels_first ? thread & (high - 1) : thread >> tiles.shift);
    const int64_t image = work.by_pixels.divide(pixel);
    const int64_t at = image * work.batch_step + (pixel - image * work.by_pixels.value) * work.pixel_step;
    const bool inside = pixel < tiles.pixels;
    const auto in = [&](int j) { return widen(x[at + j * work.channel_step]); };
    // The mirrored window: the outputs whose window holds the channel.
    const int begin = first > lrn.after ? first - lrn.after : 0;
    const int most = first + tiles.width - 1 + lrn.before, end = most < lrn.channels ? most + 1 : lrn.channels;
    A sum = 0, own = 0;
    for (int from = begin; from < end; from += tiles.width) {
      const int j = from + lane;
      if (inside && j < end) {
        const A s = lrn_scale(lrn, j, in);
        // dy * s^-beta first: where s overflowed it is 0, and x * s^-(beta+1) alone would be inf * 0.
        const A value = widen(dy[at + j * work.channel_step]) / power(s, lrn.beta);
        scaled[thread] = value;
        terms[thread] = value * in(j) / s;
      }
      __syncthreads();
      const int to = from + tiles.width < end ? from + tiles.width : end;
      const int low = channel - lrn.after > from ? channel - lrn.after : from;
      const int last = channel + lrn.before < to ? channel + lrn.before : to - 1;
      if (inside) {
#pragma unroll 1
        for (int k = low; k <= last; ++k) sum += terms[start + (k - from) * step];
        if (channel >= from && channel < to) own = scaled[start + (channel - from) * step];
      }
      __syncthreads();
    }
    // pow(s, 0) is a constant whatever s is, so nothing flows through it, not even 0 * inf.
    if (inside && channel < lrn.channels)
      dx[at + channel * work.channel_step] = narrow<T>(lrn.beta == 0 ? own : own - lrn.factor * in(channel)*sum);
  }
}

}  // namespace alexnet_ext
