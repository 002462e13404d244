#include "augment_kernels.cuh"

namespace alexnet_ext {

int augment_cuda(const Augment& p, const AugmentInputs& in, void* y, void* stream) {
  if (!fits(p.out) || p.size > kMaxSide) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t n = elements(p.out);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVector<T>;
    status = launch(p.out.channels == kColours ? augment_rows_kernel<T, V> : augment_blocks_kernel<T, V>,
                    blocks_for(ceil_div(n, V)), 0, stream, DeviceAugment<Acc<T>>(p, in), DeviceImages(p.out), n,
                    static_cast<T*>(y));
  });
  return status;
}

}  // namespace alexnet_ext
