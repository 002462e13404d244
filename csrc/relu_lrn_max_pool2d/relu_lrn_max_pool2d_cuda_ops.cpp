// relu_lrn_max_pool2d as PyTorch operators on CUDA. They run on the input's device and its current stream, and check
// the launch.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "relu_lrn_max_pool2d_plan.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> bias, int64_t lrn_size, double alpha,
                                   double beta, double k, IntList kernel, IntList stride) {
  CudaStream stream(x);
  return on_lrn_then_pool(x, bias, {lrn_size, alpha, beta, k}, kernel, stride,
                          [&](const LrnPoolBlock& p, const void* in, const void* b, void* y, uint8_t* winners) {
                            stream.check("relu_lrn_max_pool2d",
                                         relu_lrn_max_pool2d_cuda(p, in, b, y, winners, stream.get()));
                          });
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> bias,
                                    const Tensor& winners, int64_t lrn_size, double alpha, double beta, double k,
                                    IntList kernel, IntList stride) {
  CudaStream stream(x);
  return on_lrn_then_pool_backward(
      dy, x, bias, winners, {lrn_size, alpha, beta, k}, kernel, stride,
      [&](const LrnPoolBlock& p, const void* gradient, const void* in, const void* b, const uint8_t* taps, void* dx) {
        DeviceSums sums(x, p.in);
        stream.check("relu_lrn_max_pool2d_backward",
                     relu_lrn_max_pool2d_backward_cuda(p, gradient, in, b, taps, dx, sums.rows.data_ptr(),
                                                       sums.total.data_ptr(), stream.get()));
        return sums.total;
      });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_lrn_max_pool2d_backward", TORCH_BOX(&alexnet_ext::backward));
}
