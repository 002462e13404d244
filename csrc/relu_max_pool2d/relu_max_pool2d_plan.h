// Checks, layout and allocation of relu_max_pool2d for every device. `launch` runs the device's kernel.
#pragma once

#include "../common/pooling.h"

namespace alexnet_ext {

// Allocates y and winners and has launch(parameters, x, y, winners) fill them.
template <class Launch>
inline std::tuple<Tensor, Tensor> on_windows(const Tensor& x, const IntList& kernel, const IntList& stride,
                                             const IntList& padding, const IntList& dilation, bool ceil_mode,
                                             Launch&& launch) {
  ReluMaxPool2d p{dtype_of(x, "x"), images_of(x, "x"), {}, pooling_of(kernel, stride, padding, dilation)};
  p.out = pooled(p.in, p.pool, ceil_mode);
  Tensor in = dense(x, p.in);
  Tensor y = empty_images(x, p.out, x.scalar_type()), winners = empty_images(x, p.out, ScalarType::Byte);
  launch(p, in.data_ptr(), y.data_ptr(), static_cast<uint8_t*>(winners.data_ptr()));
  return {y, winners};
}

// Allocates dx and has launch(parameters, dy, winners, dx) fill it.
template <class Launch>
inline Tensor on_windows_backward(const Tensor& dy, const Tensor& winners, int64_t height, int64_t width,
                                  const IntList& kernel, const IntList& stride, const IntList& padding,
                                  const IntList& dilation, Launch&& launch) {
  ReluMaxPool2d p{dtype_of(dy, "dy"), {}, images_of(winners, "winners"), pooling_of(kernel, stride, padding, dilation)};
  check_winners(winners, dy);
  p.in = unpooled(p.out, height, width, p.pool);
  Tensor gradient = dense(dy, p.out), taps = dense(winners, p.out);
  Tensor dx = empty_images(dy, p.in, dy.scalar_type());
  launch(p, gradient.data_ptr(), static_cast<const uint8_t*>(taps.data_ptr()), dx.data_ptr());
  return dx;
}

}  // namespace alexnet_ext
