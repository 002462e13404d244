#include "augment_kernels.cuh"

namespace alexnet_ext {

int augment_cuda(const Augment& p, const AugmentInputs& in, void* y, void* stream) {
  if (!fits(p.out) || p.size > kMaxSide) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVector<T>;
    const DeviceAugment<Acc<T>> work(p, in);
    const int64_t runs = p.out.batch * work.by_runs.value;
    const auto rows = p.subsampled ? augment_rows_kernel<T, V, true> : augment_rows_kernel<T, V, false>;
    const auto blocks = p.subsampled ? augment_blocks_kernel<T, V, true> : augment_blocks_kernel<T, V, false>;
    status = launch(p.out.channels == kColours ? rows : blocks, blocks_for(runs * kWarp), 0, stream, work, runs,
                    static_cast<T*>(y));
  });
  return status;
}

}  // namespace alexnet_ext
