#include "conv2d_bias_relu_kernels.cuh"

namespace alexnet_ext {

int bias_relu_cuda(DType dtype, const Images& s, void* y, const void* bias, void* stream) {
  const int64_t n = elements(s), plane = s.height * s.width;
  if (!fits(s) || !divides(n, plane)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVector<T>;
    const bool vectors = aligned(y, bias) && n % V == 0 && (s.channels_last ? s.channels % V == 0 : plane >= V);
    status = launch(vectors ? bias_relu_kernel<T, V> : bias_relu_kernel<T, 1>, blocks_for(vectors ? n / V : n), 0,
                    stream, DeviceImages(s), Divisor(plane), n, static_cast<T*>(y), static_cast<const T*>(bias));
  });
  return status;
}

int relu_mask_cuda(DType dtype, const Images& s, const void* dy, const void* y, void* dz, void* sums, void* dbias,
                   void* stream) {
  if (!fits(s)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t rows = sum_rows_of(s);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVector<T>;
    const T *gradient = static_cast<const T*>(dy), *result = static_cast<const T*>(y);
    T* out = static_cast<T*>(dz);
    Acc<T>* partial = static_cast<Acc<T>*>(sums);
    if (s.channels_last && s.channels % 8 == 0 && s.channels <= kMaxLaneSums && aligned(dy, y, dz)) {
      status = launch(relu_mask_vectors_kernel<T, V>, rows, kBlockThreads * V * sizeof(Acc<T>), stream,
                      Divisor(s.channels / V), elements(s), gradient, result, out, partial);
    } else {
      const ChannelBlocks work(s, kElementWidths, rows);
      status = launch(relu_mask_kernel<T>, work.blocks(), kBlockThreads * sizeof(Acc<T>), stream, DeviceImages(s), work,
                      gradient, result, out, partial);
    }
    if (status == cudaSuccess && dbias != nullptr) status = sum_rows<T>(rows, s.channels, sums, dbias, stream);
  });
  return status;
}

}  // namespace alexnet_ext
