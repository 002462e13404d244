// local_response_norm as PyTorch operators on CUDA. They run on the input's device and its current stream, and check
// the launch.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "local_response_norm_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  CudaStream stream(x);
  return on_pixels(x, {size, alpha, beta, k}, [&](const LocalResponseNorm& p, const Tensor& in, Tensor& y) {
    stream.check("local_response_norm", local_response_norm_cuda(p, in.data_ptr(), y.data_ptr(), stream.get()));
  });
}

Tensor backward(const Tensor& dy, const Tensor& x, int64_t size, double alpha, double beta, double k) {
  CudaStream stream(x);
  return on_pixels(dy, x, {size, alpha, beta, k},
                   [&](const LocalResponseNorm& p, const Tensor& gradient, const Tensor& in, Tensor& dx) {
                     stream.check("local_response_norm_backward",
                                  local_response_norm_backward_cuda(p, gradient.data_ptr(), in.data_ptr(),
                                                                    dx.data_ptr(), stream.get()));
                   });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("local_response_norm", TORCH_BOX(&alexnet_ext::forward));
  m.impl("local_response_norm_backward", TORCH_BOX(&alexnet_ext::backward));
}
