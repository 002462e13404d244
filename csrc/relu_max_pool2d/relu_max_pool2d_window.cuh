// Max pooling on the device: the taps of a window, and the windows of an input. The CUDA core of every op that pools.
#pragma once

#include "../common/images.cuh"
#include "relu_max_pool2d.h"

namespace alexnet_ext {

// The maximum of a window so far, for V neighbouring channels. Values are taken in row-major order.
template <class A, int V>
struct Best {
  A value[V];
  int tap[V];
  bool empty = true;

  __device__ Best() {
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = 0, tap[i] = kNoWinner;
  }

  // With `floor` the maximum starts at ReLU's 0, and a window without a greater value has no winner.
  template <bool floor>
  __device__ void take(const A (&v)[V], int candidate) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      // Under ReLU a window without a positive value is 0. If its first value is a zero, its sign is kept.
      if (floor && empty && v[i] == 0) value[i] = v[i];
      // A NaN replaces any value, and only another NaN replaces it: the last NaN wins, as in PyTorch.
      if ((!floor && empty) || v[i] > value[i] || v[i] != v[i]) value[i] = v[i], tap[i] = candidate;
    }
    empty = false;
  }
};

// Pooling as a kernel's argument. Each is [height, width].
struct DevicePooling {
  int kernel[2], stride[2], padding[2], dilation[2];
  // Along each side, an input is in at most 1 + more_windows windows.
  int more_windows[2];
  Divisor by_stride[2], by_dilation[2];

  explicit DevicePooling(const Pooling& p)
      : by_stride{Divisor(small(p.stride[0])), Divisor(small(p.stride[1]))},
        by_dilation{Divisor(small(p.dilation[0])), Divisor(small(p.dilation[1]))} {
    for (int i = 0; i < 2; ++i) {
      kernel[i] = static_cast<int>(p.kernel[i]);
      padding[i] = static_cast<int>(p.padding[i]);
      stride[i] = static_cast<int>(by_stride[i].value);
      dilation[i] = static_cast<int>(by_dilation[i].value);
      more_windows[i] = (kernel[i] - 1) * dilation[i] / stride[i];
    }
  }

 private:
  // A stride longer than the side, or the dilation of a single tap, may be cut: its exact value does not matter.
  static int64_t small(int64_t step) { return step < 2 * kMaxSide ? step : 2 * kMaxSide; }
};

// Whether the offsets of taps fit into 32 bits. (In ceil_mode a stride longer than all sides allows a window of any
// reach.)
inline bool fits(const Pooling& p) {
  return (p.kernel[0] - 1) * p.dilation[0] <= 1 << 30 && (p.kernel[1] - 1) * p.dilation[1] <= 1 << 30;
}

// Calls f(row, column, tap) for the taps of window (oh, ow) that are inside the image. K is the side of a square window
// that the compiler knows and unrolls, else 0.
template <int K, class F>
__device__ inline void for_taps(const DevicePooling& pool, const DeviceImages& in, int oh, int ow, F&& f) {
  const int height = K ? K : pool.kernel[0], width = K ? K : pool.kernel[1];
  const int top = oh * pool.stride[0] - pool.padding[0], left = ow * pool.stride[1] - pool.padding[1];
#pragma unroll(K ? K : 1)
  for (int r = 0; r < height; ++r) {
    const int ih = top + r * pool.dilation[0];
    if (ih < 0 || ih >= in.height) continue;
#pragma unroll(K ? K : 1)
    for (int s = 0; s < width; ++s) {
      const int iw = left + s * pool.dilation[1];
      if (iw >= 0 && iw < in.width) f(ih, iw, r * width + s);
    }
  }
}

// The tap, along side i, at which window o contains the input with the padded index `from`; -1 if there is none.
__device__ inline int tap_of(const DevicePooling& pool, int i, int from, int o, int windows) {
  const int distance = from - o * pool.stride[i];
  const int tap = static_cast<int>(pool.by_dilation[i].divide(distance));
  return o >= 0 && o < windows && tap < pool.kernel[i] && tap * pool.dilation[i] == distance ? tap : -1;
}

// Calls f(oh, ow, tap) for every window that could contain input (ih, iw), in ascending order, as PyTorch adds them.
// tap is -1 if the window does not contain it. Every lane of a warp calls f equally often, so that f may exchange
// values.
template <class F>
__device__ inline void for_windows(const DevicePooling& pool, const DeviceImages& out, int ih, int iw, F&& f) {
  const int row = ih + pool.padding[0], column = iw + pool.padding[1];
  const int bottom = static_cast<int>(pool.by_stride[0].divide(row));
  const int right = static_cast<int>(pool.by_stride[1].divide(column));
#pragma unroll 1
  for (int oh = bottom - pool.more_windows[0]; oh <= bottom; ++oh) {
    const int r = tap_of(pool, 0, row, oh, out.height);
#pragma unroll 1
    for (int ow = right - pool.more_windows[1]; ow <= right; ++ow) {
      const int s = tap_of(pool, 1, column, ow, out.width);
      f(oh, ow, r < 0 || s < 0 ? -1 : r * pool.kernel[1] + s);
    }
  }
}

// sum = the gradients of the windows that V neighbouring inputs won. `at` is the first of the inputs.
template <int V, class T>
__device__ inline void gather(Acc<T> (&sum)[V], const DevicePooling& pool, const DeviceImages& out, const Position& at,
                              const T* __restrict__ dy, const uint8_t* __restrict__ winners) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = 0;
  const int64_t base = out.at(at.image, at.channel, 0, 0);
  for_windows(pool, out, at.row, at.column, [&](int oh, int ow, int tap) {
    if (tap < 0) return;
    const int64_t from = base + oh * out.row_step + ow * out.column_step;
    const Bytes<V> won = load_bytes<V>(winners + from);
    Acc<T> gradient[V];
    load<V>(gradient, dy + from);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += byte_of<V>(won, i) == tap ? gradient[i] : Acc<T>(0);
  });
}

}  // namespace alexnet_ext
