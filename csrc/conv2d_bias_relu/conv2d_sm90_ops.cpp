// The convolution by CUTLASS for compute capability 9.0 as PyTorch operators: forward with bias and ReLU, and the
// gradient of x for that of what is before the ReLU.
#include <torch/csrc/stable/library.h>

#include "conv2d_cutlass_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups, bool relu) {
  auto launch = [](DType dtype, auto&&... given) {
    return with_tensor_core_type(
        dtype, [&](auto type) { return conv2d_forward_sm90<typename decltype(type)::type>(given...); });
  };
  return forward_by("conv2d_forward_sm90", launch, x, weight, bias, stride, padding, dilation, groups, relu);
}

Tensor gradient(const Tensor& dz, const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                IntList dilation, int64_t groups, int64_t wanted) {
  auto launch = [](DType dtype, int64_t of, const Conv2d& p, const void* dz, const void* other, void* workspace,
                   void* result, void* stream) {
    return with_tensor_core_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (sizeof(T) != 2)
        return cudaErrorInvalidValue;
      else if (of == 0)
        return conv2d_input_gradient_sm90<T>(p, dz, other, result, stream);
      else
        return conv2d_weight_gradient_sm90<T>(p, dz, other, workspace, result, stream);
    });
  };
  return gradient_by("conv2d_gradient_sm90", launch, sm90_weight_gradient_workspace, dz, x, weight, stride, padding,
                     dilation, groups, wanted);
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_sm90", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_sm90_gradient", TORCH_BOX(&alexnet_ext::gradient));
}
