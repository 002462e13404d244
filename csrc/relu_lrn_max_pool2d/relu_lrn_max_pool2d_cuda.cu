#include <algorithm>

#include "relu_lrn_max_pool2d_kernels.cuh"
#include "relu_lrn_max_pool2d_rows.cuh"

namespace alexnet_ext {
namespace {

// Tiles of the output. cost(needed, own) is that of a block, see choose_tiles.
template <class Cost>
Tiles tiles_of(const LrnPoolBlock& p, int64_t lanes, int64_t most_needed, Cost&& cost) {
  const auto need = [&](int i, int64_t length) {
    return (length - 1) * std::min(p.pool.stride[i], 2 * kMaxSide) + p.pool.kernel[i];
  };
  return choose_tiles(p.out, lanes, most_needed, need, cost);
}

// In instructions of machine code for a vector: 195 for an input; 100 and 57 a tap for an output.
Tiles lane_tiles(const LrnPoolBlock& p) {
  const int64_t lanes = p.in.channels / kLaneChannels, most = kSharedBytes / (p.in.channels * sizeof(float));
  const int64_t output = 100 + 57 * p.pool.kernel[0] * p.pool.kernel[1];
  return tiles_of(p, lanes, most, [&](int64_t needed, int64_t own) { return needed * 195 + own * output; });
}

// In instructions of machine code for eight channels. Each thread of a block normalizes one input or waits for those
// that do, so that every tile costs 425 a thread. An output for each thread costs 102 more.
Tiles pixel_tiles(const LrnPoolBlock& p) {
  return tiles_of(p, 1, kBlockThreads, [](int64_t, int64_t own) {
    return kBlockThreads * (425 + 102 * ceil_div(own * kRun, kBlockThreads));
  });
}

}  // namespace

int relu_lrn_max_pool2d_cuda(const LrnPoolBlock& p, const void* x, const void* bias, void* y, uint8_t* winners,
                             void* stream) {
  if (!fits(p.in)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t n = elements(p.out);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceBlock<Acc<T>> block(p);
    const T *in = static_cast<const T*>(x), *b = static_cast<const T*>(bias);
    T* out = static_cast<T*>(y);
    if constexpr (__is_same(Acc<T>, float)) {
      const bool lanes = has_lanes(p, aligned(x, bias, y, winners));
      Tiles tiles;
      if (lanes && has_rows(p, kRowThreads<T>)) {
        const RowTiles walked(p, kRowThreads<T>);
        status = launch_blocks(relu_lrn_max_pool2d_rows_lanes_kernel<T>, walked.blocks, walked.warps * kWarp,
                               kRowShared<T>, stream, block.lrn, walked, in, b, out, winners);
        return;
      }
      if (lanes) {
        tiles = lane_tiles(p);
        status = launch(relu_lrn_max_pool2d_lanes_kernel<T, 5>, std::min(tiles.count, kMaxBlocks),
                        tiles.shared_bytes(p.in.channels), stream, block, tiles, in, b, out, winners);
      } else if (has_pixels(p)) {
        tiles = pixel_tiles(p);
        const bool three = p.pool.kernel[0] == 3 && p.pool.kernel[1] == 3;
        const Chunks work = chunks_of(tiles, p.in);
        status = launch(three ? relu_lrn_max_pool2d_pixels_kernel<T, 5, 3> : relu_lrn_max_pool2d_pixels_kernel<T, 5, 0>,
                        std::min(tiles.count * work.chunks, kMaxBlocks), tiles.shared_bytes(kRun), stream, block, tiles,
                        work, in, b, out, winners);
      }
      if (tiles.rows > 0) return;
    }
    status = launch(relu_lrn_max_pool2d_kernel<T>, blocks_for(n), 0, stream, block, n, in, b, out, winners);
  });
  return status;
}

int relu_lrn_max_pool2d_backward_cuda(const LrnPoolBlock& p, const void* dy, const void* x, const void* bias,
                                      const uint8_t* winners, void* dx, void* bias_sums, void* dbias, void* stream) {
  if (!fits(p.in)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  int64_t rows = sum_rows_of(p.in);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceBlock<Acc<T>> block(p);
    const T *gradient = static_cast<const T*>(dy), *in = static_cast<const T*>(x), *b = static_cast<const T*>(bias);
    T* out = static_cast<T*>(dx);
    Acc<T>* sums = static_cast<Acc<T>*>(bias_sums);
    bool fast = false;
    if constexpr (__is_same(Acc<T>, float)) {
      constexpr int64_t kLaneSums = kBlockThreads * kLaneChannels * sizeof(float);
      const bool lanes = has_lanes(p, aligned(dy, x, bias, winners, dx));
      fast = lanes || has_pixels(p);
      if (lanes && has_patches(p)) {
        rows = sum_rows_of(p.in, kPatchBlocks * kHopperMultiprocessors);
        status = launch(relu_lrn_max_pool2d_patches_lanes_backward_kernel<T>, rows, kLaneSums, stream, block.lrn,
                        Patches(p), gradient, in, b, winners, out, sums);
      } else if (lanes) {
        rows = sum_rows_of(p.in, kLaneBackwardBlocks * kHopperMultiprocessors);
        status = launch(relu_lrn_max_pool2d_lanes_backward_kernel<T, 5>, rows, kLaneSums, stream, block,
                        elements(p.in) / kLaneChannels, gradient, in, b, winners, out, sums);
      } else if (fast) {
        const int64_t pixels = p.in.batch * p.in.height * p.in.width;
        const int64_t busy_rows = std::max<int64_t>(1, std::min(rows, ceil_div(pixels, kBlockThreads)));
        const Chunks work(pixels, p.in.channels, ceil_div(kFullGpu, busy_rows));
        status = launch(relu_lrn_max_pool2d_pixels_backward_kernel<T, 5>, rows * work.chunks,
                        (kRun * kBlockThreads + work.channels) * sizeof(float), stream, block, work, rows, gradient, in,
                        b, winners, out, sums);
      }
    }
    if (!fast) {
      const ChannelBlocks work(p.in, kWindowWidths, rows);
      status = launch(relu_lrn_max_pool2d_backward_kernel<T>, work.blocks(), kBlockThreads * sizeof(Acc<T>), stream,
                      block, work, gradient, in, b, winners, out, sums);
    }
    if (status == cudaSuccess) status = sum_rows<T>(rows, p.in.channels, bias_sums, dbias, stream);
  });
  return status;
}

}  // namespace alexnet_ext
