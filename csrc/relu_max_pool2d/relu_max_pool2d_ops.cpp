// relu_max_pool2d as PyTorch operators on the CPU: checks, layout, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "pooling.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, IntList kernel, IntList stride, IntList padding, IntList dilation,
                                   bool ceil_mode) {
  ReluMaxPool2d p{dtype_of(x, "x"), images_of(x, "x"), {}, pooling_of(kernel, stride, padding, dilation)};
  p.out = pooled(p.in, p.pool, ceil_mode);
  Tensor in = dense(x, p.in);
  Tensor y = empty_images(x, p.out, x.scalar_type()), winners = empty_images(x, p.out, ScalarType::Byte);
  parallel(relu_max_pool2d_units(p.out), [&](int64_t begin, int64_t end) {
    with_isa(best_isa(), [&](auto isa) {
      relu_max_pool2d_cpu<isa.value>(p, in.data_ptr(), y.data_ptr(), static_cast<uint8_t*>(winners.data_ptr()), begin,
                                     end);
    });
  });
  return {y, winners};
}

Tensor backward(const Tensor& dy, const Tensor& winners, int64_t height, int64_t width, IntList kernel, IntList stride,
                IntList padding, IntList dilation) {
  ReluMaxPool2d p{dtype_of(dy, "dy"), {}, images_of(winners, "winners"), pooling_of(kernel, stride, padding, dilation)};
  check_winners(winners, dy);
  p.in = unpooled(p.out, height, width, p.pool);
  Tensor gradient = dense(dy, p.out), taps = dense(winners, p.out);
  Tensor dx = empty_images(dy, p.in, dy.scalar_type());
  parallel(relu_max_pool2d_units(p.in), [&](int64_t begin, int64_t end) {
    with_isa(best_isa(), [&](auto isa) {
      relu_max_pool2d_backward_cpu<isa.value>(p, gradient.data_ptr(), static_cast<const uint8_t*>(taps.data_ptr()),
                                              dx.data_ptr(), begin, end);
    });
  });
  return dx;
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("relu_max_pool2d", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_max_pool2d_backward", TORCH_BOX(&alexnet_ext::backward));
}
