// Checks, layout and allocation of relu_max_pool2d_lrn for every device. `launch` runs the device's kernel.
#pragma once

#include "../common/lrn_pool_block.h"
#include "relu_max_pool2d_lrn.h"

namespace alexnet_ext {

// Allocates y, pooled and winners and has launch(parameters, x, bias, y, pooled, winners) fill them.
template <class Launch>
inline std::tuple<Tensor, Tensor, Tensor> on_pool_then_lrn(const Tensor& x, std::optional<Tensor> bias, const Lrn& lrn,
                                                           const IntList& kernel, const IntList& stride,
                                                           Launch&& launch) {
  LrnPoolBlock p = block_of(x, lrn, kernel, stride);
  p.in = images_of(x, "x");
  p.out = pooled(p.in, p.pool, false);
  if (bias) bias = torch::stable::contiguous(*bias);
  const void* b = bias_data(bias, x, p.in.channels);
  Tensor in = dense(x, p.in);
  Tensor y = empty_images(x, p.out, x.scalar_type()), kept = empty_images(x, p.out, x.scalar_type());
  Tensor winners = empty_images(x, p.out, ScalarType::Byte);
  launch(p, in.data_ptr(), b, y.data_ptr(), kept.data_ptr(), static_cast<uint8_t*>(winners.data_ptr()));
  return {y, kept, winners};
}

// Allocates dx. launch(parameters, dy, pooled, winners, dx) fills it and returns dbias.
template <class Launch>
inline std::tuple<Tensor, Tensor> on_pool_then_lrn_backward(const Tensor& dy, const Tensor& kept, const Tensor& winners,
                                                            int64_t height, int64_t width, const Lrn& lrn,
                                                            const IntList& kernel, const IntList& stride,
                                                            Launch&& launch) {
  LrnPoolBlock p = block_of(kept, lrn, kernel, stride);
  p.out = images_of(kept, "pooled");
  p.in = unpooled(p.out, height, width, p.pool);
  check_shape(winners, "winners", {p.out.batch, p.out.channels, p.out.height, p.out.width});
  check_winners(winners, dy);
  check_like(dy, "dy", kept);
  Tensor activation = dense(kept, p.out), gradient = dense(dy, p.out), taps = dense(winners, p.out);
  Tensor dx = empty_images(kept, p.in, kept.scalar_type());
  Tensor dbias = launch(p, gradient.data_ptr(), activation.data_ptr(), static_cast<const uint8_t*>(taps.data_ptr()),
                        dx.data_ptr());
  return {dx, dbias};
}

}  // namespace alexnet_ext
