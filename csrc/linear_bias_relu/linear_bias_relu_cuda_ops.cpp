// linear_bias_relu as PyTorch operators on CUDA. PyTorch's own products (cuBLAS) run, the forward's with the bias; then
// one pass applies ReLU in place. Backward, one pass applies ReLU's mask and sums the bias gradient; the products
// follow. (Whether cuBLAS's own ReLU epilogue keeps NaN, as PyTorch's ReLU does, is not documented.)
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "linear_bias_relu_plan.h"

namespace alexnet_ext {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  CudaStream stream(x);
  const LinearBiasRelu p = plan(x, weight);
  bias_data(bias, x, p.outputs);
  Tensor y = rows_of(linear(x, weight, bias));
  stream.check("linear_bias_relu", linear_relu_cuda(p, y.data_ptr(), stream.get()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y,
                                            std::vector<bool> output_mask) {
  CudaStream stream(x);
  const LinearBiasRelu p = plan_backward(dy, x, weight, y);
  const Tensor gradient = rows_of(dy), result = rows_of(y), none = empty(x, {0});
  Tensor dz = empty(x, {p.rows, p.outputs});
  std::optional<DeviceSums> sums;
  if (output_mask.at(2) && p.outputs > 0) sums.emplace(x, pixels_of(p));
  stream.check("linear_bias_relu_backward",
               linear_relu_mask_cuda(p, gradient.data_ptr(), result.data_ptr(), dz.data_ptr(),
                                     sums ? sums->rows.data_ptr() : nullptr, sums ? sums->total.data_ptr() : nullptr,
                                     stream.get()));
  return {output_mask.at(0) ? torch::stable::matmul(dz, weight) : none,
          output_mask.at(1) ? torch::stable::matmul(torch::stable::transpose(dz, 0, 1), x) : none,
          sums ? sums->total : none};
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("linear_bias_relu", TORCH_BOX(&alexnet_ext::forward));
  m.impl("linear_bias_relu_backward", TORCH_BOX(&alexnet_ext::backward));
}
