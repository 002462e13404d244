// The convolution by CUTLASS as PyTorch operators: forward with bias and ReLU, and a gradient of what is before the
// ReLU. Results are channels-last.
#include <torch/csrc/stable/library.h>

#include "conv2d_cutlass_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups) {
  return product_forward("conv2d_forward_cutlass", x, weight, bias, stride, padding, dilation, groups,
                         [&](const Conv2d& p, auto... pointers) {
                           return with_tensor_core_type(dtype_of(x, "x"), [&](auto type) {
                             return conv2d_forward_cutlass<typename decltype(type)::type>(p, pointers...);
                           });
                         });
}

Tensor gradient(const Tensor& dz, const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                IntList dilation, int64_t groups, int64_t wanted) {
  check(wanted == 0 || wanted == 1, "wanted must be 0 (x) or 1 (weight), got ", wanted);
  return product_gradient(
      "conv2d_gradient_cutlass", dz, x, weight, stride, padding, dilation, groups, wanted,
      [&](const Conv2d& p, const void* out, const void* other, void* workspace, void* result, void* stream) {
        return with_tensor_core_type(dtype_of(x, "x"), [&](auto type) {
          using T = typename decltype(type)::type;
          if (wanted == 0) return conv2d_input_gradient_cutlass<T>(p, out, other, result, stream);
          return conv2d_weight_gradient_cutlass<T>(p, out, other, workspace, result, stream);
        });
      });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_cutlass", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_cutlass_gradient", TORCH_BOX(&alexnet_ext::gradient));
}
