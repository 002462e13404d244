#include "cpu_vector.h"
#include "relu_mask.h"

namespace alexnet_ext {

using namespace ALEXNET_ISA;

template <>
void relu_mask_cpu<Isa::ALEXNET_ISA>(DType dtype, const void* dy, const void* y, void* dz, int64_t n, int64_t begin,
                                     int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *gradient = static_cast<const T*>(dy), *result = static_cast<const T*>(y);
    T* out = static_cast<T*>(dz);
    const int64_t last = end * kReluRun < n ? end * kReluRun : n;
    for (int64_t i = begin * kReluRun; i < last; ++i) out[i] = widen(result[i]) <= 0 ? narrow<T>(0) : gradient[i];
  });
}

}  // namespace alexnet_ext
