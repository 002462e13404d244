// conv2d_bias_relu as PyTorch operators on CUDA. PyTorch's own convolution (cuDNN) runs without its bias; then one pass
// applies bias and ReLU in place. Backward, one pass applies the ReLU mask and sums the bias gradient; then PyTorch's
// convolution backward follows.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "aten_convolution.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
               IntList dilation, int64_t groups, bool relu) {
  CudaStream stream(x);
  const DType dtype = check_forward(x, weight, bias);
  if (bias) bias = torch::stable::contiguous(*bias);
  if (!relu) return convolution(x, weight, bias, {stride, padding, dilation, groups});
  Tensor y = convolution(x, weight, std::nullopt, {stride, padding, dilation, groups});
  const Images images = images_of(y, "y");
  y = dense(y, images);
  stream.check("bias_relu",
               bias_relu_cuda(dtype, images, y.data_ptr(), bias ? bias->data_ptr() : nullptr, stream.get()));
  return y;
}

std::tuple<Tensor, Tensor> masked(const CudaStream& stream, const Tensor& dy, const Tensor& y, const Images& images,
                                  bool for_bias) {
  Tensor gradient = dense(dy, images), result = dense(y, images), dz = empty_images(y, images, y.scalar_type());
  std::optional<DeviceSums> sums;
  if (for_bias) sums.emplace(y, images);
  stream.check("relu_mask", relu_mask_cuda(dtype_of(y, "y"), images, gradient.data_ptr(), result.data_ptr(),
                                           dz.data_ptr(), sums ? sums->rows.data_ptr() : nullptr,
                                           sums ? sums->total.data_ptr() : nullptr, stream.get()));
  const int64_t none[] = {0};
  return {dz, sums ? sums->total : torch::stable::new_empty(y, {none, 1})};
}

std::tuple<Tensor, Tensor> mask(const Tensor& dy, const Tensor& y, bool for_bias) {
  CudaStream stream(y);
  check_backward(dy, y, y);
  Images images = images_of(y, "y");
  images.channels_last = true;
  return masked(stream, dy, y, images, for_bias);
}

DepthWeight depth_of(const Tensor& weight, int64_t step) {
  check(weight.dim() == 4 && step > 0, "weight has shape ", shape_text(weight), " and step is ", step,
        ", expected 4D and at least 1");
  return {weight.size(0), weight.size(1), weight.size(2),
          weight.size(3), step,           {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
}

Tensor to_depth(const Tensor& weight, int64_t step) {
  CudaStream stream(weight);
  const DepthWeight w = depth_of(weight, step);
  const Images deep{w.filters, w.channels * step * step, ceil_div(w.height, step), ceil_div(w.width, step), true};
  Tensor result = empty_images(weight, deep, weight.scalar_type());
  stream.check("to_depth", depth_weight_cuda(dtype_of(weight, "weight"), w, weight.data_ptr(), result.data_ptr(), false,
                                             stream.get()));
  return result;
}

Tensor from_depth(const Tensor& gradient, int64_t step, int64_t height, int64_t width, bool channels_last) {
  CudaStream stream(gradient);
  Images deep = images_of(gradient, "gradient");
  deep.channels_last = true;
  check(step > 0 && deep.channels % (step * step) == 0 && deep.height == ceil_div(height, step) &&
            deep.width == ceil_div(width, step),
        "gradient ", shape_text(gradient), " is not of ", height, " x ", width, " taps at step ", step);
  const Tensor given = dense(gradient, deep);
  Tensor result = empty_images(gradient, {deep.batch, deep.channels / (step * step), height, width, channels_last},
                               gradient.scalar_type());
  stream.check("from_depth", depth_weight_cuda(dtype_of(gradient, "gradient"), depth_of(result, step), given.data_ptr(),
                                               result.data_ptr(), true, stream.get()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y,
                                            IntList stride, IntList padding, IntList dilation, int64_t groups,
                                            std::vector<bool> output_mask, bool relu) {
  CudaStream stream(x);
  check_backward(dy, x, y);
  const Convolution p{stride, padding, dilation, groups};
  if (!relu) {
    const auto gradients =
        convolution_backward(dy, x, weight, p, {output_mask.at(0), output_mask.at(1), output_mask.at(2)});
    return {gradients[0], gradients[1], gradients[2]};
  }
  const auto [dz, dbias] = masked(stream, dy, y, images_of(y, "y"), output_mask.at(2));
  auto gradients = convolution_backward(dz, x, weight, p, {output_mask.at(0), output_mask.at(1), false});
  return {gradients[0], gradients[1], dbias};
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu", TORCH_BOX(&alexnet_ext::forward));
  m.impl("conv2d_bias_relu_backward", TORCH_BOX(&alexnet_ext::backward));
  m.impl("conv2d_bias_relu_mask", TORCH_BOX(&alexnet_ext::mask));
  m.impl("conv2d_bias_relu_to_depth", TORCH_BOX(&alexnet_ext::to_depth));
  m.impl("conv2d_bias_relu_from_depth", TORCH_BOX(&alexnet_ext::from_depth));
}
