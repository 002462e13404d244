// CaffeNet's block on CUDA: bias, ReLU, pooling and LRN of x in one kernel, and its backward in another.
//
// With AlexNet's LRN there are two fast ways. Channels-last, a lane holds eight channels and gets their neighbours from
// the adjacent lanes. Contiguous, a thread walks along the channels with its window in registers.
//
// Bytes: forward reads x from memory once, as overlapping windows find it in L1 and L2. It writes y, pooled and winners
// once, at 3/2 each a quarter of x or less. Backward reads dy, pooled and winners once, and from L2 again where two
// tiles share them. It writes dx once and the bias sums. With any other LRN the backward is two kernels, which pass
// dpooled through a workspace in the arithmetic type.
#pragma once

#include "../common/patch_walk.cuh"
#include "../local_response_norm/local_response_norm_pairs.cuh"
#include "relu_max_pool2d_lrn.h"

namespace alexnet_ext {

constexpr int kWalkBlocks = 3;  // 80 registers

// The first window along side i that contains input `at`. (No padding, dilation 1.)
__device__ inline int first_window(const DevicePooling& pool, int i, int at) {
  return at < pool.kernel[i] ? 0 : static_cast<int>(pool.by_stride[i].divide(at - pool.kernel[i])) + 1;
}

// ---- channels-last: lanes of eight channels

// Windows of 3 x 3: nine loads in no branch.
template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, 3)  // 80 registers
    relu_max_pool2d_lrn_lanes_planes_kernel(DeviceLrn<float> lrn, Places work, Planes in, Step stride, Step padding,
                                            const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y,
                                            T* __restrict__ pooled, uint8_t* __restrict__ winners) {
  constexpr int V = kLaneChannels, kWarps = kBlockThreads / kWarp;
  const auto* vectors = reinterpret_cast<const Raw<T, V>*>(x);
  const int count = static_cast<int>(work.count), warp = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / kWarp);
  for_lanes<int>(count, warp, static_cast<int>(gridDim.x) * kWarps, [&](int v, bool owns) {
    const Place at(work, static_cast<uint32_t>(v));
    const NineTaps window(in, at, stride, padding);
    Raw<T, V> taps[9];
#pragma unroll
    for (int t = 0; t < 9; ++t) taps[t] = vectors[window.place[t]];
    // The sum with -0 is the value itself, -0 too.
    float add[V];
#pragma unroll
    for (int i = 0; i < V; ++i) add[i] = -0.0f;
    if (bias != nullptr) load<V>(add, bias + at.lane * V);
    Best<float, V> best;
#pragma unroll
    for (int t = 0; t < 9; ++t) {
      float values[V];
      widen<V, T>(values, taps[t]);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] += add[i];
      best.template take<true>(values, window.number[t]);
    }
    float normalized[V];
    lrn_values<N>(normalized, lrn, best.value, at.lane == 0, at.lane == in.lanes - 1);
    if (!owns) return;
    const int64_t to = static_cast<int64_t>(v) * V;
    store<V>(y + to, normalized);
    store<V>(pooled + to, best.value);
    store_bytes<V>(winners + to, best.tap);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_lanes_kernel(DeviceBlock<float> p, int64_t vectors, const T* __restrict__ x,
                                     const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ pooled,
                                     uint8_t* __restrict__ winners) {
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const Lane lane(p.lanes, v);
    const Position at = p.out.position(v * kLaneChannels);
    const T* from = x + p.in.at(at.image, lane.channel, 0, 0);
    Best<float, kLaneChannels> best;
    for_taps<0>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
      float values[kLaneChannels];
      load<kLaneChannels>(values, from + ih * p.in.row_step + iw * p.in.column_step);
      add_bias(values, bias, lane.channel);
      best.template take<true>(values, tap);
    });
    float normalized[kLaneChannels];
    lrn_values<N>(normalized, p.lrn, best.value, lane.first, lane.last);
    if (!owns) return;
    store<kLaneChannels>(y + v * kLaneChannels, normalized);
    store<kLaneChannels>(pooled + v * kLaneChannels, best.value);
    store_bytes<kLaneChannels>(winners + v * kLaneChannels, best.tap);
  });
}

// A block's gradients of pooled values: those of the windows from (top, left) on.
struct PooledTile {
  const float* gradients;  // in shared memory, as put() stores them
  int vectors, columns, lanes, top, left;

  __device__ void get(float (&values)[kLaneChannels], int oh, int ow, int lane) const {
    alexnet_ext::get(values, gradients, vectors, ((oh - top) * columns + ow - left) * lanes + lane);
  }
};

// dx of one input, and its part of the bias sums.
template <class T>
__device__ inline void unpool_input(const DeviceBlock<float>& p, const PooledTile& tile, const Position& at,
                                    const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                    float (&sum)[kLaneChannels]) {
  if (at.row >= p.in.height || at.column >= p.in.width) return;
  float out[kLaneChannels] = {};
  for_windows(p.pool, p.out, at.row, at.column, [&](int oh, int ow, int tap) {
    if (tap < 0) return;
    float gradient[kLaneChannels];
    tile.get(gradient, oh, ow, at.channel / kLaneChannels);
    add_won<kLaneChannels>(out, gradient, load_bytes<kLaneChannels>(winners + p.out.at(at.image, at.channel, oh, ow)),
                           tap);
  });
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) sum[i] += out[i];
  store<kLaneChannels>(dx + p.in.at(at.image, at.channel, at.row, at.column), out);
}

// The same for a patch of 2 x 2 inputs. Its four windows' winners are read once.
template <class T>
__device__ inline void unpool_patch(const Planes& in, const Planes& out, const PooledTile& tile, const Place& patch,
                                    const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                    float (&sum)[kLaneChannels]) {
  const int row = patch.row - 1, column = patch.column - 1, top = patch.row * 2, left = patch.column * 2;
  const int windows = out.at(patch.image, row, column, patch.lane), to = in.at(patch.image, top, left, patch.lane);
  Bytes<kLaneChannels> won[2][2];
#pragma unroll
  for (int a = 0; a < 2; ++a)
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      won[a][b] = ~Bytes<kLaneChannels>{0};
      if (out.has(row + a, column + b))
        won[a][b] = reinterpret_cast<const Bytes<kLaneChannels>*>(winners)[windows + (a * out.width + b) * out.lanes];
    }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (!in.has(top + r, left + s)) continue;
      float total[kLaneChannels] = {};
#pragma unroll
      for (int a = r; a < 2; ++a)
#pragma unroll
        for (int b = s; b < 2; ++b) {
          // A window outside has no winner. What is read for it is another window's gradient.
          const int oh = min(max(row + a, 0), out.height - 1), ow = min(max(column + b, 0), out.width - 1);
          float gradient[kLaneChannels];
          tile.get(gradient, oh, ow, patch.lane);
          add_won<kLaneChannels>(total, gradient, won[a][b], patch_tap(a, r) * 3 + patch_tap(b, s));
        }
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) sum[i] += total[i];
      store<kLaneChannels>(dx + static_cast<int64_t>(to + (r * in.width + s) * in.lanes) * kLaneChannels, total);
    }
}

// For a tile of inputs, or of patches of kSide x kSide inputs, a block computes the gradients of the pooled values into
// shared memory, and gathers from there.
template <class T, int kSide>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_lanes_backward_kernel(DeviceBlock<float> p, Planes in, Planes out, Tiles tiles,
                                              const T* __restrict__ dy, const T* __restrict__ pooled,
                                              const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                              float* __restrict__ sums) {
  float* dpooled = shared_memory<float>();
  const int lanes = static_cast<int>(p.lanes.value), all = tiles.need_rows * tiles.need_columns * lanes;
  const int owners = kBlockThreads / lanes * lanes;  // threads; each keeps its channels
  float sum[kLaneChannels] = {};
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    Position first = tile_position(tiles, tile);
    first.row *= kSide, first.column *= kSide;
    const int top = first_window(p.pool, 0, first.row), left = first_window(p.pool, 1, first.column);
    const int left_rows = p.out.height - top, rows = tiles.need_rows < left_rows ? tiles.need_rows : left_rows;
    for_lanes<int>(rows * tiles.need_columns * lanes, threadIdx.x / kWarp, kBlockThreads / kWarp,
                   [&](int v, bool owns) {
                     const TilePlace at(tiles.by_need_row, p.lanes, v);
                     const int column = left + at.column < p.out.width ? left + at.column : p.out.width - 1;
                     const int64_t from = p.out.at(first.image, at.lane * kLaneChannels, top + at.row, column);
                     float values[kLaneChannels], gradient[kLaneChannels], out[kLaneChannels];
                     load<kLaneChannels>(values, pooled + from);
                     load<kLaneChannels>(gradient, dy + from);
                     gradients_of_five(out, p.lrn, values, gradient, at.lane == 0, at.lane == lanes - 1);
                     if (owns) put(dpooled, all, v, out);
                   });
    __syncthreads();
    const PooledTile done{dpooled, all, tiles.need_columns, lanes, top, left};
    const int left_own = (p.in.height - first.row + kSide - 1) / kSide, own_rows = min(tiles.rows, left_own);
    for (int v = threadIdx.x; static_cast<int>(threadIdx.x) < owners && v < own_rows * tiles.columns * lanes;
         v += owners) {
      const TilePlace at(tiles.by_row, p.lanes, v);
      const int row = first.row / kSide + at.row, column = first.column / kSide + at.column;
      if constexpr (kSide == 2) {
        unpool_patch(in, out, done, Place(static_cast<int>(first.image), row, column, at.lane), winners, dx, sum);
      } else {
        unpool_input(p, done, {first.image, at.lane * kLaneChannels, row, column}, winners, dx, sum);
      }
    }
    __syncthreads();
  }
  sum_owners(sum, lanes, 0, owners, [](int i) { return i; }, sums);
}

// ---- contiguous: a thread walks along the channels of a patch of 2 x 2 inputs

// Bytes: the patches on the right and below that a block shares with the next are read again.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kWalkBlocks)
    relu_max_pool2d_lrn_walk_kernel(DeviceLrn<float> lrn, PatchWalks p, const T* __restrict__ x,
                                    const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ pooled,
                                    uint8_t* __restrict__ winners) {
  constexpr int kDelay = ValueWalk<5>::kDelay;
  const int step = p.height * p.width, out_step = p.out_height * p.out_width;
  const WalkedChannels block(p);
  const WalkedPatch patch(p, block.row * p.own + static_cast<int>(threadIdx.x), block.first);
  const bool pools = patch.window && static_cast<int>(threadIdx.x) < p.own;
  Channels<const T> from{x, patch.input - kDelay * step, step};
  Channels<T> to{y, patch.output, out_step};
  const Wanted wanted{p.channels, block.first, block.end};
  ValueWalk<5> walk;
  int late[] = {0, 0}, turn = 0;  // winners of the channels whose results are to come
  static_assert(kDelay == 2);
  for_runs<kRun, kDelay>(p.channels, block.first, block.end, [&](int c, auto whole) {
    float values[4][kRun];
    load_inputs(values, from, p.width, patch.inside, bias, wanted, c, whole);
    const SharedInputs shared(shared_memory<float>(), turn++);
    shared.put(values);
    __syncthreads();
    if (!pools) return;
    const Best<float, kRun> best = shared.template pooled<true>(values, p.across);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float out = walk.push(lrn, best.value[j]);
      const int winner = late[0];
      late[0] = late[1], late[1] = best.tap[j];
      if (!wanted.result(whole, c + j - kDelay)) continue;
      *to.at() = narrow<T>(out), pooled[to.place] = narrow<T>(walk.input());
      winners[to.place] = static_cast<uint8_t>(winner);
      to.next();
    }
  });
}

// A thread computes the gradient of its window's pooled value, and gathers its patch's from there.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kWalkBlocks)
    relu_max_pool2d_lrn_walk_backward_kernel(DeviceLrn<float> lrn, PatchWalks p, const T* __restrict__ dy,
                                             const T* __restrict__ pooled, const uint8_t* __restrict__ winners,
                                             T* __restrict__ dx, float* __restrict__ sums) {
  constexpr int kDelay = GradientWalk<5>::kDelay;
  static_assert(kDelay == kRun);
  const int step = p.height * p.width, out_step = p.out_height * p.out_width, before = kBlockThreads - p.own;
  const WalkedChannels block(p);
  float* shared = shared_memory<float>();
  const SharedWindows windows(shared);
  WarpTotals totals(shared + SharedWindows::kBytes / sizeof(float), p);
  const Wanted wanted{p.channels, block.first, block.end};
  const bool owns = static_cast<int>(threadIdx.x) >= before;
  for (int run = block.row; run < p.runs; run += p.rows) {
    const WalkedPatch patch(p, run * p.own + static_cast<int>(threadIdx.x) - before, block.first);
    Channels<const T> from{pooled, patch.output - kDelay * out_step, out_step};
    Channels<T> to{dx, patch.input, step};
    GradientWalk<5> walk;
    for_runs<kRun, kDelay>(p.channels, block.first, block.end, [&](int c, auto whole) {
      float value[kRun], gradient[kRun], sum[kRun];
      Bytes<kRun> taps = static_cast<Bytes<kRun>>(-1);  // no tap has won
#pragma unroll
      for (int j = 0; j < kRun; ++j, from.next()) {
        const bool channel = patch.window && wanted.channel(whole, c + j);
        value[j] = channel ? widen(*from.at()) : 0.0f;
        gradient[j] = channel ? widen(dy[from.place]) : 0.0f;
        if (patch.window && wanted.result(whole, c + j - kDelay))
          taps ^= static_cast<Bytes<kRun>>(winners[from.place - kDelay * out_step] ^ kNoWinner) << 8 * j;
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        gradient[j] = walk.push(lrn, value[j], gradient[j], wanted.channel(whole, c + j - kDelay / 2));
        sum[j] = owns && byte_of<kRun>(taps, j) != kNoWinner ? gradient[j] : 0.0f;
      }
      if (!whole.value && c - kDelay < block.first) return;
      totals.add(p, c - kDelay - block.first, sum);
      windows.put(gradient, taps);
      if (!owns) return;
      float inputs[2][2][kRun];
      windows.get(p.across).gather(inputs);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (!wanted.result(whole, c + j - kDelay)) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (patch.inside[i]) *to.at(patch_input(i, p.width)) = narrow<T>(inputs[i / 2][i % 2][j]);
        to.next();
      }
    });
  }
  totals.write(p, block, sums);
}

// ---- any layout, window and beta: element by element; neighbours' terms are shared in shared memory

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_kernel(DeviceBlock<Acc<T>> p, ChannelBlocks work, const T* __restrict__ x,
                               const T* __restrict__ bias, T* __restrict__ y, T* __restrict__ pooled,
                               uint8_t* __restrict__ winners) {
  using A = Acc<T>;
  const int channel = ChannelPlace(work).channel;
  for_pixels(work, [&](int64_t pixel, bool inside) {
    const Position at = p.out.position(pixel, channel);
    Best<A, 1> own;
    const A sum = window_sum<A>(work, p.lrn.channels, p.lrn.before, p.lrn.after, inside, [&](int j) {
      Best<A, 1> best;
      for_taps<0>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
        const A values[] = {with_bias(widen(x[p.in.at(at.image, j, ih, iw)]), bias, j)};
        best.template take<true>(values, tap);
      });
      if (j == channel) own = best;
      return best.value[0] * best.value[0];
    });
    if (!inside || channel >= p.out.channels) return;
    const int64_t to = p.out.at(at.image, channel, at.row, at.column);
    y[to] = narrow<T>(own.value[0] / power(p.lrn.k + p.lrn.mean * sum, p.lrn.beta));
    store<1>(pooled + to, own.value);
    store_bytes<1>(winners + to, own.tap);
  });
}

// The backward's first kernel: LRN's gradient of each pooled value, computed once for all inputs of its window.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_pooled_backward_kernel(DeviceBlock<Acc<T>> p, ChannelBlocks work, const T* __restrict__ dy,
                                               const T* __restrict__ pooled, Acc<T>* __restrict__ dpooled) {
  const int channel = ChannelPlace(work).channel;
  for_pixels(work, [&](int64_t pixel, bool inside) {
    const Position at = p.out.position(pixel, 0);
    const int64_t base = p.out.at(at.image, 0, at.row, at.column);
    const auto value = [&](int j) { return widen(pooled[base + j * p.out.channel_step]); };
    const auto gradient = [&](int j) { return widen(dy[base + j * p.out.channel_step]); };
    const Acc<T> out = lrn_gradient(p.lrn, work, inside, value, gradient);
    if (inside && channel < p.out.channels) dpooled[base + channel * p.out.channel_step] = out;
  });
}

// The second kernel: the pooling's gradient.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_lrn_backward_kernel(DeviceBlock<Acc<T>> p, ChannelBlocks work, const Acc<T>* __restrict__ dpooled,
                                        const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                        Acc<T>* __restrict__ sums) {
  sum_elements(work, p.in, sums, [&](const Position& at) {
    Acc<T> won[1];
    gather<1>(won, p.pool, p.out, at, dpooled, winners);
    store<1>(dx + p.in.at(at.image, at.channel, at.row, at.column), won);
    return won[0];
  });
}

}  // namespace alexnet_ext
