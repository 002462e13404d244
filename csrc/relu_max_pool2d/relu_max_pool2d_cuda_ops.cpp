// relu_max_pool2d as PyTorch operators on CUDA. They run on the input's device and its current stream, and check the
// launch.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "relu_max_pool2d_plan.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, IntList kernel, IntList stride, IntList padding, IntList dilation,
                                   bool ceil_mode) {
  CudaStream stream(x);
  return on_windows(x, kernel, stride, padding, dilation, ceil_mode,
                    [&](const ReluMaxPool2d& p, const void* in, void* y, uint8_t* winners) {
                      stream.check("relu_max_pool2d", relu_max_pool2d_cuda(p, in, y, winners, stream.get()));
                    });
}

Tensor backward(const Tensor& dy, const Tensor& winners, int64_t height, int64_t width, IntList kernel, IntList stride,
                IntList padding, IntList dilation) {
  CudaStream stream(dy);
  return on_windows_backward(dy, winners, height, width, kernel, stride, padding, dilation,
                             [&](const ReluMaxPool2d& p, const void* gradient, const uint8_t* taps, void* dx) {
                               stream.check("relu_max_pool2d_backward",
                                            relu_max_pool2d_backward_cuda(p, gradient, taps, dx, stream.get()));
                             });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("relu_max_pool2d", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_max_pool2d_backward", TORCH_BOX(&alexnet_ext::backward));
}
