// PyTorch's own convolution, called through its dispatcher, forward and backward, on any device.
#pragma once

#include "conv2d_bias_relu_plan.h"

namespace alexnet_ext {

inline Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Convolution& p) {
  using torch::stable::detail::from;
  const IntList no_output_padding = {0, 0};
  std::array<StableIValue, 9> stack{from(x),         from(weight),     from(bias),  from(p.stride),
                                    from(p.padding), from(p.dilation), from(false), from(no_output_padding),
                                    from(p.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The gradients of x, weight and bias that `mask` selects; the others are empty.
inline std::array<Tensor, 3> convolution_backward(const Tensor& dz, const Tensor& x, const Tensor& weight,
                                                  const Convolution& p, const std::array<bool, 3>& mask) {
  using torch::stable::detail::from;
  const IntList no_output_padding = {0, 0};
  const std::optional<IntList> bias_sizes = IntList{weight.size(0)};
  std::array<StableIValue, 11> stack{from(dz),
                                     from(x),
                                     from(weight),
                                     from(bias_sizes),
                                     from(p.stride),
                                     from(p.padding),
                                     from(p.dilation),
                                     from(false),
                                     from(no_output_padding),
                                     from(p.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 3> gradients;
  const int64_t none[] = {0};
  for (int i = 0; i < 3; ++i) {
    gradients[i] = torch::stable::detail::to<Tensor>(stack[i]);
    if (!mask[i]) gradients[i] = torch::stable::new_empty(x, {none, 1});
  }
  return gradients;
}

}  // namespace alexnet_ext
