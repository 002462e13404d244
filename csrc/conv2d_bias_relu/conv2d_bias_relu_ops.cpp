// conv2d_bias_relu as PyTorch operators on the CPU: PyTorch's own convolution (oneDNN), which adds the bias; ReLU in
// place behind it; the ReLU mask folded into the gradient before PyTorch's convolution backward.
// (oneDNN's own ReLU epilogue turns NaN to 0, which PyTorch's ReLU does not.)
#include <torch/csrc/stable/library.h>

#include <array>

#include "../common/tensor.h"
#include "conv2d_bias_relu.h"

namespace alexnet_ext {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;
using IntList = std::vector<int64_t>;

const IntList kNoOutputPadding = {0, 0};

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups) {
  DType dtype = dtype_of(x, "x");
  check_like(weight, "weight", x);
  std::array<StableIValue, 9> stack{from(x),      from(weight),           from(bias),
                                    from(stride), from(padding),          from(dilation),
                                    from(false),  from(kNoOutputPadding), from(groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  Tensor y = to<Tensor>(stack[0]);
  const int64_t n = y.numel();
  parallel(ceil_div(n, kReluRun), [&](int64_t begin, int64_t end) {
    with_isa(best_isa(), [&](auto isa) { relu_inplace_cpu<isa.value>(dtype, y.data_ptr(), n, begin, end); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y,
                                            IntList stride, IntList padding, IntList dilation, int64_t groups,
                                            std::vector<bool> output_mask) {
  DType dtype = dtype_of(x, "x");
  check_like(dy, "dy", x);
  check_like(y, "y", x);
  check_shape(dy, "dy", {y.sizes().begin(), y.sizes().end()});
  Tensor dz = fresh_like(y);
  Tensor gradient = with_strides_of(dz, dy), result = with_strides_of(dz, y);
  const int64_t n = y.numel();
  parallel(ceil_div(n, kReluRun), [&](int64_t begin, int64_t end) {
    with_isa(best_isa(), [&](auto isa) {
      relu_mask_cpu<isa.value>(dtype, gradient.data_ptr(), result.data_ptr(), dz.data_ptr(), n, begin, end);
    });
  });
  const std::array<bool, 3> mask{output_mask.at(0), output_mask.at(1), output_mask.at(2)};
  const std::optional<IntList> bias_sizes = IntList{weight.size(0)};
  std::array<StableIValue, 11> stack{from(dz),
                                     from(x),
                                     from(weight),
                                     from(bias_sizes),
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(false),
                                     from(kNoOutputPadding),
                                     from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  Tensor gradients[3];
  const int64_t none[] = {0};
  for (int i = 0; i < 3; ++i) {
    gradients[i] = to<Tensor>(stack[i]);
    if (!mask[i]) gradients[i] = torch::stable::new_empty(x, {none, 1});
  }
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("conv2d_bias_relu", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_backward", TORCH_BOX(&alexnet_ext::backward));
}
