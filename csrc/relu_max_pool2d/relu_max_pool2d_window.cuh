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

// ---- windows of 3 x 3 without dilation, in vectors of V channels and 32 bits

// V neighbouring elements as they are in memory: one, 16 bytes or 32.
template <class T, int V>
struct RawOf {
  using type = uint4;
};
template <class T>
struct RawOf<T, 1> {
  using type = T;
};
template <>
struct RawOf<float, 8> {
  struct type {
    uint4 low, high;
  };
};
template <class T, int V>
using Raw = typename RawOf<T, V>::type;

template <int V, class T>
__device__ inline void widen(Acc<T> (&values)[V], const Raw<T, V>& raw) {
  if constexpr (__is_same(T, bf16) && V > 1) {
    // Of two values in a word, each takes one instruction.
    const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < V; ++i)
      values[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000);
  } else {
    T elements[V];
    memcpy(elements, &raw, sizeof elements);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = widen(elements[i]);
  }
}

struct Step {
  int rows, columns;

  explicit Step(const int64_t (&sides)[2]) : rows(static_cast<int>(sides[0])), columns(static_cast<int>(sides[1])) {}
};

// Images of vectors. Contiguous images are the same: a larger batch, of one channel.
struct Planes {
  int height, width, lanes, images;

  Planes(const Images& s, int vector)
      : height(static_cast<int>(s.height)),
        width(static_cast<int>(s.width)),
        lanes(s.channels_last ? static_cast<int>(s.channels) / vector : 1),
        images(static_cast<int>(s.channels_last ? s.batch : s.batch * s.channels)) {}

  __device__ bool has(int row, int column) const { return row >= 0 && row < height && column >= 0 && column < width; }

  __device__ int at(int image, int row, int column, int lane) const {
    return ((image * height + row) * width + column) * lanes + lane;
  }

  __device__ int step() const { return height * width * lanes; }  // vectors of an image
};

// What the threads of a kernel take: every vector of rows x columns places of each image, or of each `together` images.
struct Places {
  uint32_t count;
  Divisor32 by_lanes, by_columns, by_rows;

  Places(const Planes& s, int64_t rows, int64_t columns, int together = 1)
      : count(static_cast<uint32_t>(ceil_div(s.images, together) * s.lanes * rows * columns)),
        by_lanes(s.lanes),
        by_columns(columns),
        by_rows(rows) {}
};

struct Place {
  int image, row, column, lane;

  __device__ Place(int image, int row, int column, int lane) : image(image), row(row), column(column), lane(lane) {}

  __device__ Place(const Places& work, uint32_t i) {
    const uint32_t pixel = work.by_lanes.divide(i), line = work.by_columns.divide(pixel);
    lane = static_cast<int>(i - pixel * work.by_lanes.value);
    column = static_cast<int>(pixel - line * work.by_columns.value);
    image = static_cast<int>(work.by_rows.divide(line));
    row = static_cast<int>(line) - image * static_cast<int>(work.by_rows.value);
  }
};

// Whether 32 bits count the elements, and those of a row outside the image. Without dilation every window meets the
// image.
template <class Parameters>
inline bool has_planes(const Parameters& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return p.pool.kernel[0] == 3 && p.pool.kernel[1] == 3 && p.pool.dilation[0] == 1 && p.pool.dilation[1] == 1 &&
         elements(p.in) <= kMost && elements(p.out) <= kMost;
}

// The nine taps of an output's window, in no branch, so that as many loads overlap as registers allow. Taps outside the
// image are moved to its edge, where they meet a value of their window again, under its own number.
struct NineTaps {
  int place[9], number[9];  // the vector at which a tap is, and which tap of the window it is

  __device__ NineTaps(const Planes& in, const Place& output, const Step& stride, const Step& padding) {
    const int top = output.row * stride.rows - padding.rows, left = output.column * stride.columns - padding.columns;
    const int first = in.at(output.image, 0, 0, output.lane);
#pragma unroll
    for (int t = 0; t < 9; ++t) {
      const int row = min(max(top + t / 3, 0), in.height - 1), column = min(max(left + t % 3, 0), in.width - 1);
      place[t] = first + (row * in.width + column) * in.lanes;
      number[t] = (row - top) * 3 + column - left;
    }
  }
};

// The maximum of a window under ReLU so far, and the tap that it came from.
template <class T, int V>
class Largest {
 public:
  // `first` is the window's first value, to be taken as well.
  __device__ explicit Largest(const Raw<T, V>&) {}

  __device__ void take(const Raw<T, V>& raw, int tap) {
    Acc<T> values[V];
    widen<V, T>(values, raw);
    best_.template take<true>(values, tap);
  }

  __device__ void store(T* y, uint8_t* winners) const {
    alexnet_ext::store<V>(y, best_.value);
    store_bytes<V>(winners, best_.tap);
  }

 private:
  Best<Acc<T>, V> best_;
};

// Eight values of 16 bits stay packed: four instructions take two of them.
template <class T>
class Largest<T, 8> {
 public:
  // A value that is not positive gives 0. If the first is a zero, its sign is kept.
  __device__ explicit Largest(const uint4& first) {
    const uint32_t words[] = {first.x, first.y, first.z, first.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) value_[i] = words[i] & __heq2_mask(pair(words[i]), pair(0)), tap_[i] = 0x00ff00ff;
  }

  __device__ void take(const uint4& raw, int tap) {
    const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w}, both = static_cast<uint32_t>(tap) * 0x10001;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Compared with a NaN so far as with inf: only another NaN replaces it.
      const uint32_t wins = __hgtu2_mask(pair(words[i]), __hmin2(pair(value_[i]), pair(kInf)));
      value_[i] = (words[i] & wins) | (value_[i] & ~wins);
      tap_[i] = (both & wins) | (tap_[i] & ~wins);
    }
  }

  __device__ void store(T* y, uint8_t* winners) const {
    *reinterpret_cast<uint4*>(y) = {value_[0], value_[1], value_[2], value_[3]};
    const uint64_t low = __byte_perm(tap_[0], tap_[1], 0x6420), high = __byte_perm(tap_[2], tap_[3], 0x6420);
    *reinterpret_cast<uint64_t*>(winners) = high << 32 | low;
  }

 private:
  static constexpr bool kBfloat = __is_same(T, bf16);
  static constexpr uint32_t kInf = kBfloat ? 0x7f807f80 : 0x7c007c00;

  __device__ static auto pair(uint32_t bits) {
    if constexpr (kBfloat) {
      return *reinterpret_cast<const __nv_bfloat162*>(&bits);
    } else {
      return *reinterpret_cast<const __half2*>(&bits);
    }
  }

  uint32_t value_[4], tap_[4];  // the first of two is the lower half
};

// The patches of 2 x 2 inputs along side i, for a stride of 2. They begin at the first input or, with padding, before.
template <class Parameters>
inline int64_t patches(const Parameters& p, int i) {
  return ceil_div((i == 0 ? p.in.height : p.in.width) + p.pool.padding[i], 2);
}

// Whether the backward takes patches.
template <class Parameters>
inline bool has_patches(const Parameters& p) {
  return has_planes(p) && p.pool.stride[0] == 2 && p.pool.stride[1] == 2;
}

// Along a side, a patch's own window begins at its first input, and the window before ends there. The tap at which
// window a (0: the one before) has input r of the patch; r <= a.
__device__ constexpr int patch_tap(int a, int r) { return r == 1 ? 1 : 2 - 2 * a; }

// sum += the gradients of V windows that were won by this tap.
template <int V, class A>
__device__ inline void add_won(A (&sum)[V], const A (&gradients)[V], Bytes<V> won, int tap) {
  if constexpr (V == 1) {
    if (won == tap) sum[0] += gradients[0];
    return;
  }
  const Bytes<V> differs = won ^ static_cast<Bytes<V>>(static_cast<uint64_t>(tap) * 0x0101010101010101);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (byte_of<V>(differs, i) == 0) sum[i] += gradients[i];
}

// The gradients and winners of the four windows that reach a patch of 2 x 2 inputs, for V neighbouring channels.
template <class T, int V>
struct Patch {
  Raw<T, V> gradients[2][2];
  Bytes<V> won[2][2];

  Patch() = default;

  __device__ Patch(const Planes& out, const Place& at, const T* __restrict__ dy, const uint8_t* __restrict__ winners) {
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int row = at.row - 1 + a, column = at.column - 1 + b, from = out.at(at.image, row, column, at.lane);
        gradients[a][b] = {};
        won[a][b] = static_cast<Bytes<V>>(-1);
        if (!out.has(row, column)) continue;
        gradients[a][b] = reinterpret_cast<const Raw<T, V>*>(dy)[from];
        won[a][b] = reinterpret_cast<const Bytes<V>*>(winners)[from];
      }
  }

  // sum[r][s] = the gradients that input (r, s) of the patch won, added in ascending order of windows, as PyTorch does.
  __device__ void gather(Acc<T> (&sum)[2][2][V]) const {
#pragma unroll
    for (int i = 0; i < 4 * V; ++i) sum[i / V / 2][i / V % 2][i % V] = 0;
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        Acc<T> gradient[V];
        widen<V, T>(gradient, gradients[a][b]);
      // The first row is the last of one window and the first of the next, in whose middle the second row is.
#pragma unroll
        for (int r = 0; r <= a; ++r)
#pragma unroll
          for (int s = 0; s <= b; ++s)
            add_won<V>(sum[r][s], gradient, won[a][b], patch_tap(a, r) * 3 + patch_tap(b, s));
      }
  }
};

}  // namespace alexnet_ext
