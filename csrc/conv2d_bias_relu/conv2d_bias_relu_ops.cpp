// conv2d_bias_relu as PyTorch operators on the CPU. PyTorch's own convolution (oneDNN) adds the bias; ReLU follows in
// place. Backward, the ReLU mask is applied to the gradient before PyTorch's convolution backward. 3 x 3 layers with
// many tiles use Winograd's convolution instead. (oneDNN's own ReLU epilogue turns NaN into 0; PyTorch's ReLU keeps
// it.)
#include <torch/csrc/stable/library.h>

#include "cpu/winograd_convolution.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups, bool relu) {
  const DType dtype = check_forward(x, weight, bias);
  const Convolution p{stride, padding, dilation, groups};
  if (const auto winograd = WinogradConvolution::of(x, weight, p))
    if (const auto result = winograd->forward(x, weight, bias, relu)) return *result;
  Tensor y = convolution(x, weight, bias, p);
  if (!relu) return y;
  const int64_t n = y.numel();
  on_cpu(relu_units(n), [&](auto isa, int64_t begin, int64_t end) {
    relu_inplace_cpu<isa.value>(dtype, y.data_ptr(), n, begin, end);
  });
  return y;
}

// dz = dy where y is positive or NaN, else 0.
Tensor masked(const Tensor& dy, const Tensor& y) {
  const DType dtype = dtype_of(y, "y");
  Tensor dz = fresh_like(y);
  Tensor gradient = with_strides_of(dz, dy), result = with_strides_of(dz, y);
  const int64_t n = y.numel();
  on_cpu(relu_units(n), [&](auto isa, int64_t begin, int64_t end) {
    relu_mask_cpu<isa.value>(dtype, gradient.data_ptr(), result.data_ptr(), dz.data_ptr(), n, begin, end);
  });
  return dz;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y,
                                            IntList stride, IntList padding, IntList dilation, int64_t groups,
                                            std::vector<bool> output_mask, bool relu) {
  check_backward(dy, x, y);
  const Tensor dz = relu ? masked(dy, y) : dy;
  const Convolution p{stride, padding, dilation, groups};
  const std::array<bool, 3> mask = {output_mask.at(0), output_mask.at(1), output_mask.at(2)};
  if (const auto winograd = WinogradConvolution::of(x, weight, p))
    if (const auto found = winograd->backward(dz, x, weight, mask)) return {(*found)[0], (*found)[1], (*found)[2]};
  const auto gradients = convolution_backward(dz, x, weight, p, mask);
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("conv2d_bias_relu", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_backward", TORCH_BOX(&alexnet_ext::backward));
}
