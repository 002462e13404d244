// The schema of every operator of the package. Kernels register themselves in csrc/<op>/<op>_ops.cpp. Fake, autograd,
// autocast and vmap are in alexnet_ext/ops/<op>/op.py.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/isa.h"

namespace alexnet_ext {
namespace {

std::string cpu_capability() { return isa_name(best_isa()); }

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY(alexnet_ext, m) {
  m.def("cpu_capability() -> str");

  m.def("local_response_norm(Tensor x, int size, float alpha, float beta, float k) -> Tensor");
  m.def("local_response_norm_backward(Tensor dy, Tensor x, int size, float alpha, float beta, float k) -> Tensor");

  m.def(
      "relu_max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode)"
      " -> (Tensor y, Tensor winners)");
  m.def(
      "relu_max_pool2d_backward(Tensor dy, Tensor winners, SymInt height, SymInt width, int[2] kernel_size,"
      " int[2] stride, int[2] padding, int[2] dilation) -> Tensor");

  m.def(
      "conv2d_bias_relu(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation,"
      " int groups, bool relu=True) -> Tensor");
  m.def(
      "conv2d_bias_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor y, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups, bool[3] output_mask, bool relu=True)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  // On CUDA alone: the gradient before the ReLU, channels-last, and with for_bias its sums by channel.
  m.def("conv2d_bias_relu_mask(Tensor dy, Tensor y, bool for_bias) -> (Tensor dz, Tensor dbias)");
  // A first layer's weight for images turned to depth, channels-last, and its gradient back. space_to_depth.py has them
  // for the CPU.
  m.def("conv2d_bias_relu_to_depth(Tensor weight, int step) -> Tensor");
  m.def("conv2d_bias_relu_from_depth(Tensor gradient, int step, int height, int width, bool channels_last) -> Tensor");
  // Registered if the build found CUTLASS's headers. alexnet_ext/ops/conv2d_bias_relu/cutlass.py says which operands
  // they take; they are channels-last. dz is the gradient before the ReLU. wanted is 0 for the gradient of x and 1 for
  // the gradient of weight.
  m.def(
      "conv2d_bias_relu_cutlass(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups, bool relu) -> Tensor");
  m.def(
      "conv2d_bias_relu_cutlass_gradient(Tensor dz, Tensor x, Tensor weight, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups, int wanted) -> Tensor");
  // The same for devices of compute capability 9.0 alone.
  m.def(
      "conv2d_bias_relu_sm90(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation,"
      " int groups, bool relu) -> Tensor");
  m.def(
      "conv2d_bias_relu_sm90_gradient(Tensor dz, Tensor x, Tensor weight, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups, int wanted) -> Tensor");

  m.def("linear_bias_relu(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_bias_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor y, bool[3] output_mask)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");

  m.def(
      "relu_lrn_max_pool2d(Tensor x, Tensor? bias, int lrn_size, float alpha, float beta, float k,"
      " int[2] kernel_size, int[2] stride) -> (Tensor y, Tensor winners)");
  m.def(
      "relu_lrn_max_pool2d_backward(Tensor dy, Tensor x, Tensor? bias, Tensor winners, int lrn_size, float alpha,"
      " float beta, float k, int[2] kernel_size, int[2] stride) -> (Tensor dx, Tensor dbias)");

  m.def(
      "relu_max_pool2d_lrn(Tensor x, Tensor? bias, int lrn_size, float alpha, float beta, float k,"
      " int[2] kernel_size, int[2] stride) -> (Tensor y, Tensor pooled, Tensor winners)");
  m.def(
      "relu_max_pool2d_lrn_backward(Tensor dy, Tensor pooled, Tensor winners, SymInt height, SymInt width,"
      " int lrn_size, float alpha, float beta, float k, int[2] kernel_size, int[2] stride)"
      " -> (Tensor dx, Tensor dbias)");

  m.def(
      "augment(Tensor images, Tensor offsets, Tensor flips, Tensor shifts, SymInt size, float[] mean, float[] std,"
      " ScalarType dtype, int space_to_depth) -> Tensor");

  m.def(
      "sgd_step(Tensor(a!)[] parameters, Tensor(b!)[] momenta, Tensor[] gradients, Tensor(c!)[] weights, float lr,"
      " float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step,"
      " Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&alexnet_ext::cpu_capability));
}
