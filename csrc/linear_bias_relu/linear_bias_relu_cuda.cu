#include "../conv2d_bias_relu/conv2d_bias_relu.h"
#include "linear_bias_relu_kernels.cuh"

namespace alexnet_ext {

int linear_relu_cuda(const LinearBiasRelu& p, void* y, void* stream) {
  if (p.outputs == 0) return cudaSuccess;
  return bias_relu_cuda(p.dtype, pixels_of(p), y, nullptr, stream);
}

int linear_relu_mask_cuda(const LinearBiasRelu& p, const void* dy, const void* y, void* dz, void* sums, void* dbias,
                          void* stream) {
  if (p.outputs == 0) return cudaSuccess;
  const Images pixels = pixels_of(p);
  if (!fits(pixels)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.rows > kMostColumnRows || p.outputs % kVector<T> != 0 || !aligned(dy, y, dz)) {
      status = static_cast<cudaError_t>(relu_mask_cuda(p.dtype, pixels, dy, y, dz, sums, dbias, stream));
      return;
    }
    const int64_t vectors = p.outputs / kVector<T>;
    status = launch(relu_mask_columns_vectors_kernel<T>, ceil_div(vectors, int64_t{kColumnVectors}),
                    kBlockThreads * kVector<T> * sizeof(Acc<T>), stream, p.rows, vectors, static_cast<const T*>(dy),
                    static_cast<const T*>(y), static_cast<T*>(dz), static_cast<T*>(dbias));
  });
  return status;
}

}  // namespace alexnet_ext
