// The paper's block forward, channels-last, where AlexNet's windows of 3 x 3 at stride 2 let each input be normalized
// once: a block walks down the rows of its columns.
//
// A lane takes eight channels of two neighbouring columns. It gets the third column of its window from shared memory,
// and keeps the maximum of the rows so far in registers. Taps are compared in row-major order, as PyTorch does.
#pragma once

#include "relu_lrn_max_pool2d_patches.cuh"

namespace alexnet_ext {

// The most threads of a block. Two blocks run at a time with 72 registers a thread, or with 96 where an element in
// flight takes a whole one.
template <class T>
constexpr int kRowThreads = sizeof(T) == 2 ? 448 : 320;
constexpr int kRowBlocks = 2;

// Even columns of an even row and of an odd one, and each thread's bias, for which no registers are left. As their
// sizes are constants, so are the distances of their addresses.
template <class T>
constexpr int64_t kRowShared = int64_t{3} * kRowThreads<T> * kLaneChannels * sizeof(float);

// A block pools `columns` x `rows` outputs of an image. It has one more pair of input columns, for the last window.
// Offsets count vectors of eight channels, in 32 bits.
struct RowTiles {
  int lanes, edge, height, width, out_height, out_width;
  int columns, rows, across, down;  // outputs of a tile, and tiles of an image
  int vectors, warps;               // of a block
  int64_t blocks;
  Divisor by_lanes, by_across, by_down;

  // Few tiles across, as each reads a pair of columns more; and as many tiles down as fill a GPU, as each reads a row
  // more.
  RowTiles(const LrnPoolBlock& p, int most_threads)
      : lanes(static_cast<int>(p.in.channels / kLaneChannels)),
        edge(kWarp % lanes == 0 ? 0 : 1),
        height(static_cast<int>(p.in.height)),
        width(static_cast<int>(p.in.width)),
        out_height(static_cast<int>(p.out.height)),
        out_width(static_cast<int>(p.out.width)),
        by_lanes(lanes),
        by_across(1),
        by_down(1) {
    const int owners = kWarp - 2 * edge, most = most_threads / kWarp * owners / lanes - 1;
    across = static_cast<int>(ceil_div(out_width, most));
    columns = static_cast<int>(ceil_div(out_width, across));
    vectors = (columns + 1) * lanes;
    warps = static_cast<int>(ceil_div(vectors, owners));
    by_across = Divisor(across);
    constexpr int kMostDown = 64, kSlots = kRowBlocks * kHopperMultiprocessors;
    int64_t least = INT64_MAX;
    for (int tiles = 1; tiles <= kMostDown && tiles <= out_height; ++tiles) {
      const int64_t own = ceil_div(out_height, tiles), full = ceil_div(out_height, own);
      const int64_t count = p.in.batch * across * full, cost = ceil_div(count, kSlots) * (2 * own + 1);
      if (cost >= least) continue;
      least = cost, rows = static_cast<int>(own), down = static_cast<int>(full), blocks = count;
    }
    by_down = Divisor(down);
  }
};

// For a block that has_lanes: a row of at least four outputs fits a block, and outputs are whole blocks.
inline bool has_rows(const LrnPoolBlock& p, int most_threads) {
  constexpr int64_t kLeastColumns = 4, kLeastOwners = kWarp - 2;
  return has_patches(p) && (kLeastColumns + 1) * (p.in.channels / kLaneChannels) <= most_threads / kWarp * kLeastOwners;
}

// The maximum of a window so far, for a lane's channels.
struct Maximum {
  float value[kLaneChannels];
  int tap[kLaneChannels];

  // Takes values after those before them in row-major order: the first of equal values stays, and the last NaN wins.
  __device__ void take(const float (&values)[kLaneChannels], int candidate) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) take(i, values[i], candidate);
  }

  // Takes the maximum of a whole row, the third of the window. Its taps are columns.
  __device__ void take_third(const Maximum& row) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) take(i, row.value[i], 6 + row.tap[i]);
  }

 private:
  __device__ void take(int i, float v, int candidate) {
    if (v > value[i] || v != v) value[i] = v, tap[i] = candidate;
  }
};

// The part of a lane in its block.
struct RowLane {
  int v, group, right;  // its vector in the block, its eight channels, the vector of its window's third column
  bool first, last;     // channels of the pixel
  bool owns, pools;     // it normalizes for itself, and it has a window
  int rows;             // outputs of the block
  int place, step, to;  // its first input, the input on the right of it, its first output

  __device__ explicit RowLane(const RowTiles& p) {
    const int unit = blockIdx.x, line = p.by_across.divide(unit), image = p.by_down.divide(line);
    const int top = (line - image * p.down) * p.rows, left = (unit - line * p.across) * p.columns;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int own = warp * (kWarp - 2 * p.edge) + lane - p.edge;
    v = own < 0 ? 0 : own < p.vectors ? own : p.vectors - 1;
    const int column = p.by_lanes.divide(v), pair = left + column;
    group = v - column * p.lanes;
    first = group == 0, last = group == p.lanes - 1;
    owns = lane >= p.edge && lane < kWarp - p.edge && own < p.vectors;
    pools = owns && column < p.columns && pair < p.out_width;
    right = v + p.lanes < p.vectors ? v + p.lanes : p.vectors - 1;
    rows = p.out_height - top < p.rows ? p.out_height - top : p.rows;
    // The last pair of columns may reach past the image.
    const int even = 2 * pair < p.width ? 2 * pair : p.width - 1;
    place = ((image * p.height + 2 * top) * p.width + even) * p.lanes + group;
    step = even + 1 < p.width ? p.lanes : 0;
    to = ((image * p.out_height + top) * p.out_width + pair) * p.lanes + group;
  }
};

// Bytes: x is read once, except a row for each tile of outputs and a pair of columns for each tile of a row. y and
// winners are written once.
template <class T>
__global__ void __launch_bounds__(kRowThreads<T>, kRowBlocks)
    relu_lrn_max_pool2d_rows_lanes_kernel(DeviceLrn<float> lrn, RowTiles p, const T* __restrict__ x,
                                          const T* __restrict__ bias, T* __restrict__ y,
                                          uint8_t* __restrict__ winners) {
  constexpr int kVectors = kRowThreads<T>;
  float *even_rows = shared_memory<float>(), *odd_rows = even_rows + kVectors * kLaneChannels;
  float* biases = odd_rows + kVectors * kLaneChannels;
  RowLane own(p);
  float add[kLaneChannels] = {};
  if (bias != nullptr) load<kLaneChannels>(add, bias + own.group * kLaneChannels);
  put(biases, kVectors, threadIdx.x, add);
  Vector<T> from[] = {vector_at(x, own.place), vector_at(x, own.place + own.step)};
  const auto normalize = [&](float (&values)[kLaneChannels], int i) {
    float active[kLaneChannels];
    get(add, biases, kVectors, threadIdx.x);
    activate(active, from[i], add);
    values_of_five(values, lrn, active, own.first, own.last);
  };
  // Calls f(values, column) for a row's three columns. The next row is on its way meanwhile.
  const auto for_row = [&](float* buffer, bool more, auto&& f) {
    float values[kLaneChannels];
    normalize(values, 0);
    if (own.owns) put(buffer, kVectors, own.v, values);
    f(values, 0);
    normalize(values, 1);
    own.place += p.width * p.lanes;
    if (more) from[0] = vector_at(x, own.place), from[1] = vector_at(x, own.place + own.step);
    f(values, 1);
    __syncthreads();
    get(values, buffer, kVectors, own.right);
    f(values, 2);
  };
  Maximum window, third;
  const auto take_third = [&](const float (&values)[kLaneChannels], int c) {
    if (c > 0) return third.take(values, c);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) third.value[i] = values[i], third.tap[i] = 0;
  };
  for_row(even_rows, true, take_third);
  for (; own.rows > 0; --own.rows) {
    window = third;
    for_row(odd_rows, true, [&](const float (&values)[kLaneChannels], int c) { window.take(values, 3 + c); });
    for_row(even_rows, own.rows > 1, take_third);
    window.take_third(third);
    if (own.pools) {
      store<kLaneChannels>(y + int64_t{own.to} * kLaneChannels, window.value);
      store_bytes<kLaneChannels>(winners + int64_t{own.to} * kLaneChannels, window.tap);
    }
    own.to += p.out_width * p.lanes;
  }
}

}  // namespace alexnet_ext
