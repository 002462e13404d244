// The paper's block on CUDA: bias, ReLU, LRN and pooling of x in one kernel, and its backward in another.
//
// With AlexNet's LRN there are two fast ways. Channels-last, a lane holds eight channels and gets their neighbours from
// the adjacent lanes. Contiguous, a thread walks along the channels with its window in registers.
//
// Bytes: forward reads x once, and writes y and winners (at 3/2 a quarter of x) once. Tiles share inputs at their
// edges; these come from L1 or L2 and are normalized again in each tile. Backward reads x, dy and winners once, and
// writes dx once and the bias sums.
#pragma once

#include "../common/lrn_pool_block.cuh"

namespace alexnet_ext {

// ---- channels-last: lanes of eight channels. (relu_lrn_max_pool2d_rows.cuh and _patches.cuh are for AlexNet's
// windows.)

// A block normalizes the inputs of a tile of outputs into shared memory, then pools them from there.
template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_lrn_max_pool2d_lanes_kernel(DeviceBlock<float> p, Tiles tiles, const T* __restrict__ x,
                                     const T* __restrict__ bias, T* __restrict__ y, uint8_t* __restrict__ winners) {
  float* normalized = shared_memory<float>();
  const int lanes = static_cast<int>(p.lanes.value), all = tiles.need_rows * tiles.need_columns * lanes;
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const Position first = tile_position(tiles, tile);
    const int left_rows = p.out.height - first.row, rows = tiles.rows < left_rows ? tiles.rows : left_rows;
    const int top = first.row * p.pool.stride[0], left = first.column * p.pool.stride[1];
    const int need_rows = (rows - 1) * p.pool.stride[0] + p.pool.kernel[0];
    const T* from = x + p.in.at(first.image, 0, top, 0);
    for_lanes<int>(need_rows * tiles.need_columns * lanes, threadIdx.x / kWarp, kBlockThreads / kWarp,
                   [&](int v, bool owns) {
                     const TilePlace at(tiles.by_need_row, p.lanes, v);
                     // The last tile of a row may reach past the image.
                     const int column = left + at.column < p.in.width ? left + at.column : p.in.width - 1;
                     const int channel = at.lane * kLaneChannels;
                     float values[kLaneChannels], out[kLaneChannels];
                     load<kLaneChannels>(values, from + at.row * p.in.row_step + column * p.in.column_step + channel);
                     add_bias(values, bias, channel);
#pragma unroll
                     for (int i = 0; i < kLaneChannels; ++i) values[i] = relu(values[i]);
                     lrn_values<N>(out, p.lrn, values, at.lane == 0, at.lane == lanes - 1);
                     if (owns) put(normalized, all, v, out);
                   });
    __syncthreads();
    const int height = p.pool.kernel[0], width = p.pool.kernel[1];
    for (int v = threadIdx.x; v < rows * tiles.columns * lanes; v += kBlockThreads) {
      const TilePlace at(tiles.by_row, p.lanes, v);
      if (first.column + at.column >= p.out.width) continue;
      Best<float, kLaneChannels> best;
#pragma unroll 1
      for (int r = 0; r < height; ++r)
#pragma unroll 1
        for (int s = 0; s < width; ++s) {
          const int row = at.row * p.pool.stride[0] + r, column = at.column * p.pool.stride[1] + s;
          float values[kLaneChannels];
          get(values, normalized, all, (row * tiles.need_columns + column) * lanes + at.lane);
          best.template take<false>(values, r * width + s);
        }
      const int64_t to = p.out.at(first.image, at.lane * kLaneChannels, first.row + at.row, first.column + at.column);
      store<kLaneChannels>(y + to, best.value);
      store_bytes<kLaneChannels>(winners + to, best.tap);
    }
    __syncthreads();
  }
}

// With 64 registers fp32 would spill.
constexpr int kLaneBackwardBlocks = 3;

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads, kLaneBackwardBlocks)
    relu_lrn_max_pool2d_lanes_backward_kernel(DeviceBlock<float> p, int64_t vectors, const T* __restrict__ dy,
                                              const T* __restrict__ x, const T* __restrict__ bias,
                                              const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                              float* __restrict__ sums) {
  float sum[kLaneChannels] = {};
  for_lanes(vectors, [&](int64_t v, bool owns) {
    const Lane lane(p.lanes, v);
    float values[kLaneChannels], gradient[kLaneChannels], out[kLaneChannels];
    load<kLaneChannels>(values, x + v * kLaneChannels);
    add_bias(values, bias, lane.channel);
    gather<kLaneChannels>(gradient, p.pool, p.out, p.in.position(v * kLaneChannels), dy, winners);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) values[i] = relu(values[i]);
    lrn_gradients<N>(out, p.lrn, values, gradient, lane.first, lane.last);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      if (values[i] <= 0) out[i] = 0;
      if (owns) sum[i] += out[i];
    }
    if (owns) store<kLaneChannels>(dx + v * kLaneChannels, out);
  });
  sum_vectors<kLaneChannels, kOwners>(sum, p.lanes, sums);
}

// ---- any layout, window and beta: element by element; backward shares the neighbours' terms in shared memory

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_lrn_max_pool2d_kernel(DeviceBlock<Acc<T>> p, int64_t n, const T* __restrict__ x, const T* __restrict__ bias,
                               T* __restrict__ y, uint8_t* __restrict__ winners) {
  for_each(n, [&](int64_t i) {
    const Position at = p.out.position(i);
    Best<Acc<T>, 1> best;
    for_taps<0>(p.pool, p.in, at.row, at.column, [&](int ih, int iw, int tap) {
      const T* from = x + p.in.at(at.image, 0, ih, iw);
      const auto activation = [&](int j) { return relu(with_bias(widen(from[j * p.in.channel_step]), bias, j)); };
      const Acc<T> values[] = {lrn_value(p.lrn, at.channel, activation)};
      best.template take<false>(values, tap);
    });
    store<1>(y + i, best.value);
    store_bytes<1>(winners + i, best.tap);
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 3)  // 80 registers
    relu_lrn_max_pool2d_backward_kernel(DeviceBlock<Acc<T>> p, ChannelBlocks work, const T* __restrict__ dy,
                                        const T* __restrict__ x, const T* __restrict__ bias,
                                        const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                        Acc<T>* __restrict__ sums) {
  sum_pixels(work, p.in, sums, [&](const Position& at, bool inside) {
    const int64_t base = p.in.at(at.image, 0, at.row, at.column);
    const auto activation = [&](int j) { return relu(with_bias(widen(x[base + j * p.in.channel_step]), bias, j)); };
    const auto gradient = [&](int j) {
      Acc<T> won[1];
      gather<1>(won, p.pool, p.out, {at.image, j, at.row, at.column}, dy, winners);
      return won[0];
    };
    Acc<T> out = lrn_gradient(p.lrn, work, inside, activation, gradient);
    if (!inside || at.channel >= p.in.channels) return Acc<T>(0);
    if (activation(at.channel) <= 0) out = 0;
    dx[base + at.channel * p.in.channel_step] = narrow<T>(out);
    return out;
  });
}

}  // namespace alexnet_ext
