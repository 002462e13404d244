// ReLU and its mask on the CPU: one read and one write of what the convolution made, and no second tensor kept.
#include "../common/cpu_vector.h"
#include "conv2d_bias_relu.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

// f(first, last) for the elements of the units [begin, end).
template <class F>
void for_elements(int64_t n, int64_t begin, int64_t end, F&& f) {
  int64_t last = end * kReluRun;
  f(begin * kReluRun, last < n ? last : n);
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void relu_inplace_cpu<Isa::ALEXNET_ISA>(DType dtype, void* y, int64_t n, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = static_cast<T*>(y);
    for_elements(n, begin, end, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        // Written as !(v <= 0) so that NaN takes this branch, and stored as it came, not rounded again.
        values[i] = widen(values[i]) <= 0 ? narrow<T>(0) : values[i];
      }
    });
  });
}

template <>
void relu_mask_cpu<Isa::ALEXNET_ISA>(DType dtype, const void* dy, const void* y, void* dz, int64_t n, int64_t begin,
                                     int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *gradient = static_cast<const T*>(dy), *result = static_cast<const T*>(y);
    T* out = static_cast<T*>(dz);
    for_elements(n, begin, end, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) out[i] = widen(result[i]) <= 0 ? narrow<T>(0) : gradient[i];
    });
  });
}

}  // namespace alexnet_ext
