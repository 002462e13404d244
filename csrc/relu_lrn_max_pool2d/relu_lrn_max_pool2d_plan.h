// Checks, layout and allocation of relu_lrn_max_pool2d for every device. `launch` runs the device's kernel.
#pragma once

#include "../common/lrn_pool_block.h"

namespace alexnet_ext {

// Allocates y and winners and has launch(parameters, x, bias, y, winners) fill them.
template <class Launch>
inline std::tuple<Tensor, Tensor> on_lrn_then_pool(const Tensor& x, std::optional<Tensor> bias, const Lrn& lrn,
                                                   const IntList& kernel, const IntList& stride, Launch&& launch) {
  LrnPoolBlock p = block_of(x, lrn, kernel, stride);
  p.in = images_of(x, "x");
  p.out = pooled(p.in, p.pool, false);
  if (bias) bias = torch::stable::contiguous(*bias);
  const void* b = bias_data(bias, x, p.in.channels);
  Tensor in = dense(x, p.in);
  Tensor y = empty_images(x, p.out, x.scalar_type()), winners = empty_images(x, p.out, ScalarType::Byte);
  launch(p, in.data_ptr(), b, y.data_ptr(), static_cast<uint8_t*>(winners.data_ptr()));
  return {y, winners};
}

// Allocates dx. launch(parameters, dy, x, bias, winners, dx) fills it and returns dbias.
template <class Launch>
inline std::tuple<Tensor, Tensor> on_lrn_then_pool_backward(const Tensor& dy, const Tensor& x,
                                                            std::optional<Tensor> bias, const Tensor& winners,
                                                            const Lrn& lrn, const IntList& kernel,
                                                            const IntList& stride, Launch&& launch) {
  LrnPoolBlock p = block_of(x, lrn, kernel, stride);
  p.in = images_of(x, "x");
  p.out = pooled(p.in, p.pool, false);
  check_shape(winners, "winners", {p.out.batch, p.out.channels, p.out.height, p.out.width});
  check_winners(winners, dy);
  check_like(dy, "dy", x);
  if (bias) bias = torch::stable::contiguous(*bias);
  const void* b = bias_data(bias, x, p.in.channels);
  Tensor in = dense(x, p.in), gradient = dense(dy, p.out), taps = dense(winners, p.out);
  Tensor dx = empty_images(x, p.in, x.scalar_type());
  Tensor dbias =
      launch(p, gradient.data_ptr(), in.data_ptr(), b, static_cast<const uint8_t*>(taps.data_ptr()), dx.data_ptr());
  return {dx, dbias};
}

}  // namespace alexnet_ext
