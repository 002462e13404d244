#include <algorithm>

#include "relu_lrn_max_pool2d_kernels.cuh"
#include "relu_lrn_max_pool2d_rows.cuh"
#include "relu_lrn_max_pool2d_walk.cuh"

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
      if (lanes && has_rows(p, kRowThreads<T>)) {
        const RowTiles walked(p, kRowThreads<T>);
        status = launch_blocks(relu_lrn_max_pool2d_rows_lanes_kernel<T>, walked.blocks, walked.warps * kWarp,
                               kRowShared<T>, stream, block.lrn, walked, in, b, out, winners);
        return;
      }
      if (lanes) {
        const Tiles tiles = lane_tiles(p);
        status = launch(relu_lrn_max_pool2d_lanes_kernel<T, 5>, std::min(tiles.count, kMaxBlocks),
                        tiles.shared_bytes(p.in.channels), stream, block, tiles, in, b, out, winners);
        if (tiles.rows > 0) return;
      }
      if (has_walks(p)) {
        const PatchWalks work(p, kWalkBlocks * kHopperMultiprocessors);
        status = launch(relu_lrn_max_pool2d_walk_kernel<T>, work.blocks(), SharedInputs::kBytes, stream, block.lrn,
                        work, in, b, out, winners);
        return;
      }
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
      fast = lanes || has_walks(p);
      if (lanes && has_patches(p)) {
        rows = sum_rows_of(p.in, kPatchBlocks * kHopperMultiprocessors);
        status = launch(relu_lrn_max_pool2d_patches_lanes_backward_kernel<T>, rows, kLaneSums, stream, block.lrn,
                        Patches(p), gradient, in, b, winners, out, sums);
      } else if (lanes) {
        rows = sum_rows_of(p.in, kLaneBackwardBlocks * kHopperMultiprocessors);
        status = launch(relu_lrn_max_pool2d_lanes_backward_kernel<T, 5>, rows, kLaneSums, stream, block,
                        elements(p.in) / kLaneChannels, gradient, in, b, winners, out, sums);
      } else if (fast) {
        const PatchWalks work(p, kWalkBlocks * kHopperMultiprocessors, rows);
        rows = work.rows;
        status = launch(relu_lrn_max_pool2d_walk_backward_kernel<T>, work.blocks(),
                        SharedWindows::kBytes + WarpTotals::shared_bytes(work), stream, block.lrn, work, gradient, in,
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
