// relu_max_pool2d as PyTorch operators on the CPU.
#include <torch/csrc/stable/library.h>

#include "relu_max_pool2d_plan.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, IntList kernel, IntList stride, IntList padding, IntList dilation,
                                   bool ceil_mode) {
  return on_windows(x, kernel, stride, padding, dilation, ceil_mode,
                    [](const ReluMaxPool2d& p, const void* in, void* y, uint8_t* winners) {
                      on_cpu(relu_max_pool2d_units(p.out), [&](auto isa, int64_t begin, int64_t end) {
                        relu_max_pool2d_cpu<isa.value>(p, in, y, winners, begin, end);
                      });
                    });
}

Tensor backward(const Tensor& dy, const Tensor& winners, int64_t height, int64_t width, IntList kernel, IntList stride,
                IntList padding, IntList dilation) {
  return on_windows_backward(dy, winners, height, width, kernel, stride, padding, dilation,
                             [](const ReluMaxPool2d& p, const void* gradient, const uint8_t* taps, void* dx) {
                               on_cpu(relu_max_pool2d_units(p.in), [&](auto isa, int64_t begin, int64_t end) {
                                 relu_max_pool2d_backward_cpu<isa.value>(p, gradient, taps, dx, begin, end);
                               });
                             });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("relu_max_pool2d", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_max_pool2d_backward", TORCH_BOX(&alexnet_ext::backward));
}
