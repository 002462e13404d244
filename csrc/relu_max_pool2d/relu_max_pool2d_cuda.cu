#include "relu_max_pool2d_kernels.cuh"

namespace alexnet_ext {
namespace {

// Calls f(Constant<V>): V fills 16 bytes for channels-last tensors whose channels and addresses allow it, else V is 1.
template <class T, class F>
cudaError_t with_vector(const Images& s, bool aligned, F&& f) {
  if (s.channels_last && s.channels % kVector<T> == 0 && aligned) return f(Constant<kVector<T>>{});
  return f(Constant<1>{});
}

}  // namespace

int relu_max_pool2d_cuda(const ReluMaxPool2d& p, const void* x, void* y, uint8_t* winners, void* stream) {
  if (!fits(p.in) || !fits(p.pool)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t n = elements(p.out);
  const bool three = p.pool.kernel[0] == 3 && p.pool.kernel[1] == 3;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = with_vector<T>(p.in, aligned(x, y, winners), [&](auto v) {
      constexpr int V = v.value;
      return launch(three ? relu_max_pool2d_kernel<T, V, 3> : relu_max_pool2d_kernel<T, V, 0>, blocks_for(n / V), 0,
                    stream, DevicePooling(p.pool), DeviceImages(p.in), DeviceImages(p.out), n, static_cast<const T*>(x),
                    static_cast<T*>(y), winners);
    });
  });
  return status;
}

int relu_max_pool2d_backward_cuda(const ReluMaxPool2d& p, const void* dy, const uint8_t* winners, void* dx,
                                  void* stream) {
  if (!fits(p.in) || !fits(p.pool)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t n = elements(p.in);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = with_vector<T>(p.in, aligned(dy, winners, dx), [&](auto v) {
      constexpr int V = v.value;
      return launch(relu_max_pool2d_backward_kernel<T, V>, blocks_for(n / V), 0, stream, DevicePooling(p.pool),
                    DeviceImages(p.in), DeviceImages(p.out), n, static_cast<const T*>(dy), winners,
                    static_cast<T*>(dx));
    });
  });
  return status;
}

}  // namespace alexnet_ext
