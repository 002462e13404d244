// The PyTorch operators of the convolutions on tensor cores, shared by cutlass/ and sm90/: checks, layout, allocation,
// launch. Results are channels-last.
#pragma once

#include "../common/cuda_stream.h"
#include "conv2d.h"

namespace alexnet_ext {

// t, channels-last and aligned to 16 bytes: t itself, or a copy.
inline Tensor on_boundary(const Tensor& t, const char* name) {
  Images images = images_of(t, name);
  images.channels_last = true;
  const Tensor whole = dense(t, images);
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % 16 == 0 ? whole : torch::stable::clone(whole);
}

inline Conv2d problem_of(const Tensor& x, const Tensor& weight, const IntList& stride, const IntList& padding,
                         const IntList& dilation, int64_t groups) {
  check(groups > 0, "groups must be positive, got ", groups);
  check(x.dim() == 4 && weight.dim() == 4, "x and weight must be 4D, got ", shape_text(x), " and ", shape_text(weight));
  check_like(weight, "weight", x);
  check_shape(weight, "weight", {weight.size(0), x.size(1) / groups, weight.size(2), weight.size(3)});
  check(x.size(1) % groups == 0 && weight.size(0) % groups == 0, "groups must divide ", x.size(1), " and ",
        weight.size(0), " channels, got ", groups);
  int64_t size[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t room = x.size(2 + i) + 2 * padding.at(i) - dilation.at(i) * (weight.size(2 + i) - 1) - 1;
    check(stride.at(i) > 0 && room >= 0, "weight ", shape_text(weight), " does not fit into x ", shape_text(x),
          " at stride ", stride.at(i));
    size[i] = room / stride[i] + 1;
  }
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          weight.size(0),
          weight.size(2),
          weight.size(3),
          size[0],
          size[1],
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          groups};
}

inline Tensor empty_channels_last(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return empty_images(like, {batch, channels, height, width, true}, like.scalar_type());
}

// Calls f(Type<T>{}) with the C++ type of dtype. fp64 has no kernel.
template <class F>
int with_tensor_core_type(DType dtype, F&& f) {
  int status = cudaErrorInvalidValue;
  with_type(dtype, [&](auto type) {
    if constexpr (sizeof(typename decltype(type)::type) <= 4) status = f(type);
  });
  return status;
}

// Kernels has the launchers forward<T>, input_gradient<T> and weight_gradient<T>, and workspace(p), the floats that the
// last one needs. kForward<T> and kGradients<T> say what T has.
template <class Kernels>
Tensor forward_by(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, IntList stride, IntList padding,
                  IntList dilation, int64_t groups, bool relu) {
  CudaStream stream(x);
  const Conv2d p = problem_of(x, weight, stride, padding, dilation, groups);
  const Tensor in = on_boundary(x, "x"), filters = on_boundary(weight, "weight");
  bias_data(bias, x, p.filters);
  if (bias) bias = torch::stable::contiguous(*bias);
  if (bias && reinterpret_cast<uintptr_t>(bias->data_ptr()) % 16 != 0) bias = torch::stable::clone(*bias);
  Tensor y = empty_channels_last(x, p.batch, p.filters, p.out_height, p.out_width);
  stream.check(Kernels::kForwardName, with_tensor_core_type(dtype_of(x, "x"), [&](auto type) -> int {
                 using T = typename decltype(type)::type;
                 if constexpr (!Kernels::template kForward<T>)
                   return cudaErrorInvalidValue;
                 else
                   return Kernels::template forward<T>(p, in.data_ptr(), filters.data_ptr(),
                                                       bias ? bias->data_ptr() : nullptr, relu, y.data_ptr(),
                                                       stream.get());
               }));
  return y;
}

// `wanted` is 0 for the gradient of x and 1 for the gradient of weight.
template <class Kernels>
Tensor gradient_by(const Tensor& dz, const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                   IntList dilation, int64_t groups, int64_t wanted) {
  check(wanted == 0 || wanted == 1, "wanted must be 0 (x) or 1 (weight), got ", wanted);
  const Tensor &like = wanted == 0 ? x : weight, &other = wanted == 0 ? weight : x;
  CudaStream stream(x);
  const Conv2d p = problem_of(x, weight, stride, padding, dilation, groups);
  check_like(dz, "dz", x);
  check_shape(dz, "dz", {p.batch, p.filters, p.out_height, p.out_width});
  const Tensor out = on_boundary(dz, "dz"), operand = on_boundary(other, "x or weight");
  const int64_t sizes[] = {wanted == 0 ? 0 : Kernels::workspace(p)};
  const Tensor workspace = torch::stable::empty({sizes, 1}, ScalarType::Float, std::nullopt, x.device());
  Tensor result = empty_channels_last(like, like.size(0), like.size(1), like.size(2), like.size(3));
  stream.check(Kernels::kGradientName, with_tensor_core_type(dtype_of(dz, "dz"), [&](auto type) -> int {
                 using T = typename decltype(type)::type;
                 if constexpr (!Kernels::template kGradients<T>)
                   return cudaErrorInvalidValue;
                 else if (wanted == 0)
                   return Kernels::template input_gradient<T>(p, out.data_ptr(), operand.data_ptr(), result.data_ptr(),
                                                              stream.get());
                 else
                   return Kernels::template weight_gradient<T>(p, out.data_ptr(), operand.data_ptr(),
                                                               workspace.data_ptr(), result.data_ptr(), stream.get());
               }));
  return result;
}

}  // namespace alexnet_ext
