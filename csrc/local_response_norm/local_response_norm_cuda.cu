#include "local_response_norm_kernels.cuh"

namespace alexnet_ext {

int local_response_norm_cuda(const LocalResponseNorm& p, const void* x, void* y, void* stream) {
  cudaError_t status = cudaSuccess;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = launch(local_response_norm_kernel<T>, blocks_for(p.batch * p.pixels), 0, stream, p, static_cast<const T*>(x),
                    static_cast<T*>(y));
  });
  return status;
}

int local_response_norm_backward_cuda(const LocalResponseNorm& p, const void* dy, const void* x, void* dx,
                                      void* stream) {
  cudaError_t status = cudaSuccess;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = launch(local_response_norm_backward_kernel<T>, blocks_for(p.batch * p.pixels), 0, stream, p, static_cast<const T*>(dy),
                    static_cast<const T*>(x), static_cast<T*>(dx));
  });
  return status;
}

}  // namespace alexnet_ext
