#include "relu_max_pool2d_kernels.cuh"

namespace alexnet_ext {
namespace {

// Calls f(Constant<V>): V fills 16 bytes for channels-last tensors whose channels and addresses allow it, else V is 1.
template <class T, class F>
cudaError_t with_vector(const Images& s, bool aligned, F&& f) {
  if (s.channels_last && s.channels % kVector<T> == 0 && aligned) return f(Constant<kVector<T>>{});
  return f(Constant<1>{});
}

// Whether no window reaches over the image's edge.
bool all_inside(const ReluMaxPool2d& p) {
  const Pooling& pool = p.pool;
  return pool.padding[0] == 0 && pool.padding[1] == 0 && pooled_length(p.in.height, pool, 0, false) == p.out.height &&
         pooled_length(p.in.width, pool, 1, false) == p.out.width;
}

// Whether the kernels for windows of 3 x 3 apply: for vectors of channels, or for single elements of contiguous images.
bool has_places(const ReluMaxPool2d& p, int vector) { return has_planes(p) && (vector > 1 || !p.in.channels_last); }

}  // namespace

int relu_max_pool2d_cuda(const ReluMaxPool2d& p, const void* x, void* y, uint8_t* winners, void* stream) {
  if (!fits(p.in) || !fits(p.pool)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  const int64_t n = elements(p.out);
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = with_vector<T>(p.in, aligned(x, y, winners), [&](auto v) {
      constexpr int V = v.value;
      const T* in = static_cast<const T*>(x);
      T* out = static_cast<T*>(y);
      if (has_places(p, V)) {
        const Places work(Planes(p.out, V), p.out.height, p.out.width, kTogether<V>);
        constexpr bool kSingle = V == 1;
        return launch(kSingle && all_inside(p) ? relu_max_pool2d_planes_kernel<T, V, kSingle>
                                               : relu_max_pool2d_planes_kernel<T, V, false>,
                      ceil_div(work.count, kBlockThreads), 0, stream, work, Planes(p.in, V), Planes(p.out, V),
                      Step(p.pool.stride), Step(p.pool.padding), in, out, winners);
      }
      return launch(relu_max_pool2d_kernel<T, V>, blocks_for(n / V), 0, stream, DevicePooling(p.pool),
                    DeviceImages(p.in), DeviceImages(p.out), n, in, out, winners);
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
      const T* gradient = static_cast<const T*>(dy);
      T* to = static_cast<T*>(dx);
      if (has_patches(p) && has_places(p, V)) {
        const Places work(Planes(p.in, V), patches(p, 0), patches(p, 1), kTogether<V>);
        return launch(relu_max_pool2d_patches_backward_kernel<T, V>, ceil_div(work.count, kBlockThreads), 0, stream,
                      work, Planes(p.in, V), Planes(p.out, V), Step(p.pool.padding), gradient, winners, to);
      }
      return launch(relu_max_pool2d_backward_kernel<T, V>, blocks_for(n / V), 0, stream, DevicePooling(p.pool),
                    DeviceImages(p.in), DeviceImages(p.out), n, gradient, winners, to);
    });
  });
  return status;
}

}  // namespace alexnet_ext
