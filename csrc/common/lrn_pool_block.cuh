// Shared by the CUDA kernels of both blocks that fuse ReLU, LRN and max pooling: parameters, activation, tiles of
// images, sums of a warp.
#pragma once

#include "../local_response_norm/local_response_norm_window.cuh"
#include "../relu_lrn_max_pool2d/relu_lrn_max_pool2d.h"
#include "../relu_max_pool2d/relu_max_pool2d_window.cuh"
#include "channel_sums.cuh"

namespace alexnet_ext {

// LrnPoolBlock as a kernel's argument.
template <class A>
struct DeviceBlock {
  DeviceLrn<A> lrn;
  DevicePooling pool;
  DeviceImages in, out;
  Divisor lanes;  // division by the lanes of a pixel, of eight channels each

  explicit DeviceBlock(const LrnPoolBlock& p)
      : lrn(p.lrn, p.in.channels),
        pool(p.pool),
        in(p.in),
        out(p.out),
        lanes(p.in.channels < kLaneChannels ? 1 : p.in.channels / kLaneChannels) {}
};

// Whether the kernels for lanes of eight channels apply: AlexNet's LRN, channels-last.
inline bool has_lanes(const LrnPoolBlock& p, bool aligned) {
  return p.dtype != DType::f64 && p.lrn.size == 5 && has_fast_lrn(p.lrn) && p.in.channels_last &&
         p.in.channels % kLaneChannels == 0 && p.in.channels <= kMaxLaneSums && aligned;
}

// NaN passes.
template <class A>
__device__ inline A relu(A v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (__is_same(A, float)) {  // one instruction instead of two
    float larger;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(larger) : "f"(v));
    return larger;
  }
#endif
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

// A lane's first channel, and whether the lane is the first or the last of its pixel.
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

// ---- tiles: values that several windows share are computed once and kept in shared memory

constexpr int64_t kSharedBytes = 48 << 10;

// One side's images (input or output), cut into tiles of rows x columns. Each tile needs need_rows x need_columns
// pixels of the other side.
struct Tiles {
  int rows = 0, columns = 0, need_rows = 0, need_columns = 0;
  int64_t count = 0;  // 0: even the smallest tile needs too much shared memory
  Divisor by_down{1}, by_across{1};
  Divisor by_need_row{1}, by_row{1};  // rows are counted in lanes

  int64_t shared_bytes(int64_t channels) const { return need_rows * need_columns * channels * sizeof(float); }
};

// The cheapest tiles of s. cost_of(needed, own) is the cost of a tile with that many needed pixels and pixels of its
// own; kFullGpu blocks run at a time. need(i, length) is the number of pixels that a tile of that length needs along
// side i. A tile needs at most most_needed pixels. A pixel has `lanes` vectors.
template <class Need, class Cost>
inline Tiles choose_tiles(const Images& s, int64_t lanes, int64_t most_needed, Need&& need, Cost&& cost_of) {
  constexpr int64_t kLengths[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16};
  Tiles best;
  int64_t least = 0;
  for (int64_t rows : kLengths)
    for (int64_t columns : kLengths) {
      const int64_t needed = need(0, rows) * need(1, columns);
      if (needed > most_needed) continue;
      const int64_t down = ceil_div(s.height, rows), across = ceil_div(s.width, columns);
      const int64_t count = s.batch * down * across, rounds = ceil_div(count, kFullGpu);
      const int64_t cost = rounds * cost_of(needed, rows * columns);
      if (best.rows != 0 && cost >= least) continue;
      least = cost;
      best = {static_cast<int>(rows),
              static_cast<int>(columns),
              static_cast<int>(need(0, rows)),
              static_cast<int>(need(1, columns)),
              count,
              Divisor(down),
              Divisor(across),
              Divisor(need(1, columns) * lanes),
              Divisor(columns * lanes)};
    }
  return best;
}

// A tile's first pixel.
__device__ inline Position tile_position(const Tiles& tiles, int64_t tile) {
  const int64_t line = tiles.by_across.divide(tile), image = tiles.by_down.divide(line);
  return {image, 0, static_cast<int>(line - image * tiles.by_down.value) * tiles.rows,
          static_cast<int>(tile - line * tiles.by_across.value) * tiles.columns};
}

// The place of vector v in a tile. by_row divides by the vectors of a row.
struct TilePlace {
  int row, column, lane;

  __device__ TilePlace(const Divisor& by_row, const Divisor& lanes, int v) {
    row = static_cast<int>(by_row.divide(v));
    const int rest = v - row * static_cast<int>(by_row.value);
    column = static_cast<int>(lanes.divide(rest));
    lane = rest - column * static_cast<int>(lanes.value);
  }
};

// Eight channels are stored in shared memory as two halves. Each half is next to the same half of the neighbours, so
// that no two lanes of a quarter warp hit one bank.
__device__ inline void put(float* shared, int vectors, int v, const float (&values)[kLaneChannels]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = values[half * 4 + i];
    store<4>(shared + (half * vectors + v) * 4, four);
  }
}

__device__ inline void get(float (&values)[kLaneChannels], const float* shared, int vectors, int v) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float four[4];
    load<4>(four, shared + (half * vectors + v) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[half * 4 + i] = four[i];
  }
}

}  // namespace alexnet_ext
