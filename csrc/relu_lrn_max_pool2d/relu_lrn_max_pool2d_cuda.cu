#include "relu_lrn_max_pool2d_kernels.cuh"

namespace alexnet_ext {
namespace {

// Tiles of the output. An input costs some 125 instructions, an output of nine taps 270.
Tiles tiles_of(const LrnPoolBlock& p) {
  return choose_tiles(p.out, 125, 270,
                      [&](int i, int64_t length) { return (length - 1) * p.pool.stride[i] + p.pool.kernel[i]; });
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
      const Tiles tiles = has_lanes(p, aligned(x, bias, y, winners)) ? tiles_of(p) : Tiles();
      if (tiles.count > 0) {
        const bool three = p.pool.kernel[0] == 3 && p.pool.kernel[1] == 3;
        status = launch(three ? relu_lrn_max_pool2d_lanes_kernel<T, 5, 3> : relu_lrn_max_pool2d_lanes_kernel<T, 5, 0>,
                        tiles.count < kMaxBlocks ? tiles.count : kMaxBlocks, tiles.shared_bytes(p.in.channels), stream,
                        block, tiles, in, b, out, winners);
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
  const int64_t rows = sum_rows_of(p.in);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceBlock<Acc<T>> block(p);
    const T *gradient = static_cast<const T*>(dy), *in = static_cast<const T*>(x), *b = static_cast<const T*>(bias);
    T* out = static_cast<T*>(dx);
    Acc<T>* sums = static_cast<Acc<T>*>(bias_sums);
    bool lanes = false;
    if constexpr (__is_same(Acc<T>, float)) {
      lanes = has_lanes(p, aligned(dy, x, bias, winners, dx));
      if (lanes)
        status =
            launch(relu_lrn_max_pool2d_lanes_backward_kernel<T, 5>, rows, kBlockThreads * kLaneChannels * sizeof(float),
                   stream, block, elements(p.in) / kLaneChannels, gradient, in, b, winners, out, sums);
    }
    if (!lanes) {
      const ChannelBlocks work(p.in, rows);
      status = launch(relu_lrn_max_pool2d_backward_kernel<T>, work.blocks(), kBlockThreads * sizeof(Acc<T>), stream,
                      block, work, gradient, in, b, winners, out, sums);
    }
    if (status == cudaSuccess) status = sum_rows<T>(rows, p.in.channels, bias_sums, dbias, stream);
  });
  return status;
}

}  // namespace alexnet_ext
