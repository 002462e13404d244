// relu_max_pool2d_lrn as PyTorch operators on the CPU: checks, layout, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "../relu_lrn_max_pool2d/block.h"
#include "relu_max_pool2d_lrn.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> bias, int64_t lrn_size, double alpha,
                                           double beta, double k, IntList kernel, IntList stride) {
  LrnPoolBlock p = block_of(x, {lrn_size, alpha, beta, k}, kernel, stride);
  p.in = images_of(x, "x");
  p.out = pooled(p.in, p.pool, false);
  if (bias) bias = torch::stable::contiguous(*bias);
  const std::optional<Tensor> bias_row = dense_bias(bias, x, p.in.channels);
  const void* b = data_or_null(bias_row);
  Tensor in = dense(x, p.in);
  Tensor y = empty_images(x, p.out, x.scalar_type()), kept = empty_images(x, p.out, x.scalar_type());
  Tensor winners = empty_images(x, p.out, ScalarType::Byte);
  parallel(band_count(p.out), [&](int64_t begin, int64_t end) {
    with_isa(best_isa(), [&](auto isa) {
      relu_max_pool2d_lrn_cpu<isa.value>(p, in.data_ptr(), b, y.data_ptr(), kept.data_ptr(),
                                         static_cast<uint8_t*>(winners.data_ptr()), begin, end);
    });
  });
  return {y, kept, winners};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& kept, const Tensor& winners, int64_t height,
                                    int64_t width, int64_t lrn_size, double alpha, double beta, double k,
                                    IntList kernel, IntList stride) {
  LrnPoolBlock p = block_of(kept, {lrn_size, alpha, beta, k}, kernel, stride);
  p.out = images_of(kept, "pooled");
  p.in = unpooled(p.out, height, width, p.pool);
  check_shape(winners, "winners", {p.out.batch, p.out.channels, p.out.height, p.out.width});
  check_winners(winners, dy);
  check_like(dy, "dy", kept);
  Tensor activation = dense(kept, p.out), gradient = dense(dy, p.out), taps = dense(winners, p.out);
  Tensor dx = empty_images(kept, p.in, kept.scalar_type());
  BiasSums sums(p);
  parallel(band_count(p.in), [&](int64_t begin, int64_t end) {
    with_isa(best_isa(), [&](auto isa) {
      relu_max_pool2d_lrn_backward_cpu<isa.value>(p, gradient.data_ptr(), activation.data_ptr(),
                                                  static_cast<const uint8_t*>(taps.data_ptr()), dx.data_ptr(),
                                                  sums.data(), begin, end);
    });
  });
  return {dx, sums.total(kept)};
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("relu_max_pool2d_lrn", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_max_pool2d_lrn_backward", TORCH_BOX(&alexnet_ext::backward));
}
