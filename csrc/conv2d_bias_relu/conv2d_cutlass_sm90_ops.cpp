// The convolution by CUTLASS's kernels for compute capability 9.0 as PyTorch operators, of the same schemas.
#include <torch/csrc/stable/library.h>

#include "conv2d_cutlass_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups) {
  return product_forward("conv2d_forward_sm90", x, weight, bias, stride, padding, dilation, groups,
                         [&](const Conv2d& p, auto... pointers) {
                           return with_tensor_core_type(dtype_of(x, "x"), [&](auto type) {
                             return conv2d_forward_sm90<typename decltype(type)::type>(p, pointers...);
                           });
                         });
}

Tensor gradient(const Tensor& dz, const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                IntList dilation, int64_t groups, int64_t wanted) {
  check(wanted == 0, "wanted must be 0 (x), as there is no kernel for the weight's gradient, got ", wanted);
  return product_gradient("conv2d_input_gradient_sm90", dz, x, weight, stride, padding, dilation, groups, wanted,
                          [&](const Conv2d& p, const void* out, const void* other, void*, void* result, void* stream) {
                            return with_tensor_core_type(dtype_of(x, "x"), [&](auto type) -> int {
                              using T = typename decltype(type)::type;
                              if constexpr (sizeof(T) == 2)
                                return conv2d_input_gradient_sm90<T>(p, out, other, result, stream);
                              return cudaErrorInvalidValue;  // wgmma takes TF32 along the channels alone
                            });
                          });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_cutlass_sm90", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_cutlass_sm90_gradient", TORCH_BOX(&alexnet_ext::gradient));
}
