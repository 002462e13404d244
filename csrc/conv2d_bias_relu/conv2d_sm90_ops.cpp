// The convolution by CUTLASS for compute capability 9.0 as PyTorch operators: forward with bias and ReLU, and the
// gradient of x for that of what is before the ReLU.
#include <torch/csrc/stable/library.h>

#include "conv2d_cutlass_plan.h"

namespace alexnet_ext {
namespace {

// f(Type<T>{}) for the C++ type that has a kernel.
template <class F>
int with_half_type(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(Type<bf16>{});
  if (dtype == DType::f16) return f(Type<f16>{});
  return cudaErrorInvalidValue;
}

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups, bool relu) {
  auto launch = [](DType dtype, auto&&... given) {
    return with_half_type(dtype,
                          [&](auto type) { return conv2d_forward_sm90<typename decltype(type)::type>(given...); });
  };
  return forward_by("conv2d_forward_sm90", launch, x, weight, bias, stride, padding, dilation, groups, relu);
}

Tensor input_gradient(const Tensor& dz, const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                      IntList dilation, int64_t groups) {
  auto launch = [](DType dtype, auto&&... given) {
    return with_half_type(
        dtype, [&](auto type) { return conv2d_input_gradient_sm90<typename decltype(type)::type>(given...); });
  };
  const Conv2d p = problem_of(x, weight, stride, padding, dilation, groups);
  return gradient_by("conv2d_input_gradient_sm90", launch, p, dz, x, weight);
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_sm90", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_sm90_input_gradient", TORCH_BOX(&alexnet_ext::input_gradient));
}
