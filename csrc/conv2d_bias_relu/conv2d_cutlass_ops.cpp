// The convolution by CUTLASS as PyTorch operators: forward with bias and ReLU, and a gradient of what is before the
// ReLU.
#include <torch/csrc/stable/library.h>

#include "conv2d_cutlass_plan.h"

namespace alexnet_ext {
namespace {

// f(Type<T>{}) for the C++ type that has a kernel.
template <class F>
int with_tensor_core_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f16:
      return f(Type<f16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups, bool relu) {
  auto launch = [](DType dtype, auto&&... given) {
    return with_tensor_core_type(
        dtype, [&](auto type) { return conv2d_forward_cutlass<typename decltype(type)::type>(given...); });
  };
  return forward_by("conv2d_forward_cutlass", launch, x, weight, bias, stride, padding, dilation, groups, relu);
}

// The gradient of x (wanted 0) or of weight (wanted 1).
Tensor gradient(const Tensor& dz, const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                IntList dilation, int64_t groups, int64_t wanted) {
  check(wanted == 0 || wanted == 1, "wanted must be 0 (x) or 1 (weight), got ", wanted);
  const Conv2d p = problem_of(x, weight, stride, padding, dilation, groups);
  const int64_t sizes[] = {wanted == 0 ? 0 : weight_gradient_workspace(p)};
  const Tensor workspace = torch::stable::empty({sizes, 1}, ScalarType::Float, std::nullopt, x.device());
  auto launch = [&](DType dtype, const Conv2d&, const void* dz, const void* other, void* result, void* stream) {
    return with_tensor_core_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (wanted == 0) return conv2d_input_gradient_cutlass<T>(p, dz, other, result, stream);
      return conv2d_weight_gradient_cutlass<T>(p, dz, other, workspace.data_ptr(), result, stream);
    });
  };
  return gradient_by("conv2d_gradient_cutlass", launch, p, dz, wanted == 0 ? x : weight, wanted == 0 ? weight : x);
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_cutlass", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_cutlass_gradient", TORCH_BOX(&alexnet_ext::gradient));
}
