#include <algorithm>

#include "relu_max_pool2d_lrn_kernels.cuh"

namespace alexnet_ext {
namespace {

// Tiles of the input. A pooled value costs some 240 instructions, an input 140.
Tiles tiles_of(const LrnPoolBlock& p) {
  const int64_t lengths[] = {p.out.height, p.out.width};
  return choose_tiles(p.in, 240, 140, [&](int i, int64_t length) {
    return std::min(lengths[i], (length - 1 + p.pool.kernel[i] - 1) / p.pool.stride[i] + 1);
  });
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
        const bool three = p.pool.kernel[0] == 3 && p.pool.kernel[1] == 3;
        status = launch(three ? relu_max_pool2d_lrn_lanes_kernel<T, 5, 3> : relu_max_pool2d_lrn_lanes_kernel<T, 5, 0>,
                        lane_blocks(vectors), 0, stream, block, vectors, in, b, out, kept, winners);
        return;
      }
    }
    status = launch(relu_max_pool2d_lrn_kernel<T>, blocks_for(n), 0, stream, block, n, in, b, out, kept, winners);
  });
  return status;
}

int relu_max_pool2d_lrn_backward_cuda(const LrnPoolBlock& p, const void* dy, const void* pooled, const uint8_t* winners,
                                      void* dx, void* bias_sums, void* dbias, void* stream) {
  if (!fits(p.in)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t rows = sum_rows_of(p.in);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceBlock<Acc<T>> block(p);
    const T *gradient = static_cast<const T*>(dy), *kept = static_cast<const T*>(pooled);
    T* out = static_cast<T*>(dx);
    Acc<T>* sums = static_cast<Acc<T>*>(bias_sums);
    bool lanes = false;
    if constexpr (__is_same(Acc<T>, float)) {
      const Tiles tiles = has_lanes(p, aligned(dy, pooled, winners, dx)) ? tiles_of(p) : Tiles();
      lanes = tiles.count > 0;
      // The bias sums go through the same shared memory.
      const int64_t for_sums = kBlockThreads * kLaneChannels * sizeof(float);
      if (lanes)
        status = launch(relu_max_pool2d_lrn_lanes_backward_kernel<T, 5>, rows,
                        std::max(for_sums, tiles.shared_bytes(p.in.channels)), stream, block, tiles, gradient, kept,
                        winners, out, sums);
    }
    if (!lanes) {
      const ChannelBlocks work(p.in, rows);
      status = launch(relu_max_pool2d_lrn_backward_kernel<T>, work.blocks(), kBlockThreads * sizeof(Acc<T>), stream,
                      block, work, gradient, kept, winners, out, sums);
    }
    if (status == cudaSuccess) status = sum_rows<T>(rows, p.in.channels, bias_sums, dbias, stream);
  });
  return status;
}

}  // namespace alexnet_ext
