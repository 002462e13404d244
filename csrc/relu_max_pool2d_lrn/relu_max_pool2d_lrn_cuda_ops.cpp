// relu_max_pool2d_lrn as PyTorch operators on CUDA. They run on the input's device and its current stream, and check
// the launch.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "relu_max_pool2d_lrn_plan.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> bias, int64_t lrn_size, double alpha,
                                           double beta, double k, IntList kernel, IntList stride) {
  CudaStream stream(x);
  return on_pool_then_lrn(
      x, bias, {lrn_size, alpha, beta, k}, kernel, stride,
      [&](const LrnPoolBlock& p, const void* in, const void* b, void* y, void* kept, uint8_t* winners) {
        stream.check("relu_max_pool2d_lrn", relu_max_pool2d_lrn_cuda(p, in, b, y, kept, winners, stream.get()));
      });
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& kept, const Tensor& winners, int64_t height,
                                    int64_t width, int64_t lrn_size, double alpha, double beta, double k,
                                    IntList kernel, IntList stride) {
  CudaStream stream(kept);
  return on_pool_then_lrn_backward(
      dy, kept, winners, height, width, {lrn_size, alpha, beta, k}, kernel, stride,
      [&](const LrnPoolBlock& p, const void* gradient, const void* activation, const uint8_t* taps, void* dx) {
        DeviceSums sums(kept, p.in);
        std::optional<Tensor> dpooled;
        if (relu_max_pool2d_lrn_needs_dpooled(p, gradient, activation, taps, dx))
          dpooled = empty_images(kept, p.out, sums.rows.scalar_type());
        stream.check("relu_max_pool2d_lrn_backward",
                     relu_max_pool2d_lrn_backward_cuda(p, gradient, activation, taps, dx,
                                                       dpooled ? dpooled->data_ptr() : nullptr, sums.rows.data_ptr(),
                                                       sums.total.data_ptr(), stream.get()));
        return sums.total;
      });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("relu_max_pool2d_lrn", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_max_pool2d_lrn_backward", TORCH_BOX(&alexnet_ext::backward));
}
