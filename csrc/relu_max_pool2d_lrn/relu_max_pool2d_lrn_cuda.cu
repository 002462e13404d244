#include <algorithm>

#include "relu_max_pool2d_lrn_kernels.cuh"

namespace alexnet_ext {
namespace {

// Tiles of the input, whose pixels have `lanes` vectors. A pooled vector costs about 240 instructions, an input vector
// 140.
Tiles tiles_of(const LrnPoolBlock& p, int64_t lanes, int64_t most_needed) {
  const int64_t lengths[] = {p.out.height, p.out.width};
  const auto need = [&](int i, int64_t length) {
    return std::min(lengths[i], (length - 1 + p.pool.kernel[i] - 1) / p.pool.stride[i] + 1);
  };
  return choose_tiles(p.in, lanes, most_needed, need,
                      [](int64_t needed, int64_t own) { return needed * 240 + own * 140; });
}

// The same of patches of 2 x 2 inputs. A pooled vector costs 340 instructions, a vector of patches 504.
Tiles patch_tiles_of(const LrnPoolBlock& p, int64_t lanes, int64_t most_needed) {
  const int64_t lengths[] = {p.out.height, p.out.width};
  const Images s{p.in.batch, p.in.channels, patches(p, 0), patches(p, 1), p.in.channels_last};
  const auto need = [&](int i, int64_t length) { return std::min(lengths[i], length + 1); };
  return choose_tiles(s, lanes, most_needed, need,
                      [](int64_t needed, int64_t own) { return needed * 340 + own * 504; });
}

// The tiles of the backward in lanes. There are none if a single input needs too much shared memory.
Tiles backward_tiles(const LrnPoolBlock& p, bool lanes) {
  if (!lanes) return Tiles();
  const int64_t most = kSharedBytes / (p.in.channels * static_cast<int64_t>(sizeof(float)));
  const int64_t vectors = p.in.channels / kLaneChannels;
  return has_patches(p) ? patch_tiles_of(p, vectors, most) : tiles_of(p, vectors, most);
}

}  // namespace

int relu_max_pool2d_lrn_cuda(const LrnPoolBlock& p, const void* x, const void* bias, void* y, void* pooled,
                             uint8_t* winners, void* stream) {
  if (!fits(p.in)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t n = elements(p.out);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceBlock<Acc<T>> block(p);
    const T *in = static_cast<const T*>(x), *b = static_cast<const T*>(bias);
    T *out = static_cast<T*>(y), *kept = static_cast<T*>(pooled);
    if constexpr (__is_same(Acc<T>, float)) {
      if (has_lanes(p, aligned(x, bias, y, pooled, winners))) {
        const int64_t vectors = n / kLaneChannels;
        if (has_planes(p)) {
          const Places work(Planes(p.out, kLaneChannels), p.out.height, p.out.width);
          status =
              launch(relu_max_pool2d_lrn_lanes_planes_kernel<T, 5>, lane_blocks(vectors), 0, stream, block.lrn, work,
                     Planes(p.in, kLaneChannels), Step(p.pool.stride), Step(p.pool.padding), in, b, out, kept, winners);
        } else {
          status = launch(relu_max_pool2d_lrn_lanes_kernel<T, 5>, lane_blocks(vectors), 0, stream, block, vectors, in,
                          b, out, kept, winners);
        }
        return;
      }
      if (has_walks(p)) {
        const PatchWalks work(p, kWalkBlocks * kHopperMultiprocessors);
        status = launch(relu_max_pool2d_lrn_walk_kernel<T>, work.blocks(), SharedInputs::kBytes, stream, block.lrn,
                        work, in, b, out, kept, winners);
        return;
      }
    }
    const ChannelBlocks work(p.out, kWindowWidths);
    status = launch(relu_max_pool2d_lrn_kernel<T>, work.blocks(), kBlockThreads * sizeof(Acc<T>), stream, block, work,
                    in, b, out, kept, winners);
  });
  return status;
}

bool relu_max_pool2d_lrn_needs_dpooled(const LrnPoolBlock& p, const void* dy, const void* pooled,
                                       const uint8_t* winners, const void* dx) {
  return !has_walks(p) && backward_tiles(p, has_lanes(p, aligned(dy, pooled, winners, dx))).rows == 0;
}

int relu_max_pool2d_lrn_backward_cuda(const LrnPoolBlock& p, const void* dy, const void* pooled, const uint8_t* winners,
                                      void* dx, void* dpooled, void* bias_sums, void* dbias, void* stream) {
  if (!fits(p.in)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  int64_t rows = sum_rows_of(p.in);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceBlock<Acc<T>> block(p);
    const T *gradient = static_cast<const T*>(dy), *kept = static_cast<const T*>(pooled);
    T* out = static_cast<T*>(dx);
    Acc<T>* sums = static_cast<Acc<T>*>(bias_sums);
    if (dpooled != nullptr) {
      Acc<T>* between = static_cast<Acc<T>*>(dpooled);
      const ChannelBlocks over_pooled(p.out, kWindowWidths), work(p.in, kElementWidths, rows);
      const int64_t shared = kBlockThreads * sizeof(Acc<T>);
      status = launch(relu_max_pool2d_lrn_pooled_backward_kernel<T>, over_pooled.blocks(), shared, stream, block,
                      over_pooled, gradient, kept, between);
      if (status == cudaSuccess)
        status = launch(relu_max_pool2d_lrn_backward_kernel<T>, work.blocks(), shared, stream, block, work, between,
                        winners, out, sums);
    } else if constexpr (__is_same(Acc<T>, float)) {
      const bool lanes = has_lanes(p, aligned(dy, pooled, winners, dx));
      const Tiles tiles = backward_tiles(p, lanes);
      if (lanes) {
        // The bias sums use the same shared memory.
        const int64_t for_sums = kBlockThreads * kLaneChannels * sizeof(float);
        status = launch(has_patches(p) ? relu_max_pool2d_lrn_lanes_backward_kernel<T, 2>
                                       : relu_max_pool2d_lrn_lanes_backward_kernel<T, 1>,
                        rows, std::max(for_sums, tiles.shared_bytes(p.in.channels)), stream, block,
                        Planes(p.in, kLaneChannels), Planes(p.out, kLaneChannels), tiles, gradient, kept, winners, out,
                        sums);
      } else {
        const PatchWalks work(p, kWalkBlocks * kHopperMultiprocessors, rows);
        rows = work.rows;
        status = launch(relu_max_pool2d_lrn_walk_backward_kernel<T>, work.blocks(),
                        SharedWindows::kBytes + WarpTotals::shared_bytes(work), stream, block.lrn, work, gradient, kept,
                        winners, out, sums);
      }
    }
    if (status == cudaSuccess) status = sum_rows<T>(rows, p.in.channels, bias_sums, dbias, stream);
  });
  return status;
}

}  // namespace alexnet_ext
