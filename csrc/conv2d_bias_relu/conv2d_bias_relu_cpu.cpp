// ReLU on the CPU, in place on the convolution's result: one read and one write, and no second tensor to keep.
#include "../common/cpu_vector.h"
#include "conv2d_bias_relu.h"

namespace alexnet_ext {

using namespace ALEXNET_ISA;

template <>
void relu_inplace_cpu<Isa::ALEXNET_ISA>(DType dtype, void* y, int64_t n, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = static_cast<T*>(y);
    const int64_t last = end * kReluRun < n ? end * kReluRun : n;
    for (int64_t i = begin * kReluRun; i < last; ++i) {
      // The test is v <= 0 so that NaN passes. A value that passes is stored as it came, not rounded again.
      values[i] = widen(values[i]) <= 0 ? narrow<T>(0) : values[i];
    }
  });
}

}  // namespace alexnet_ext
