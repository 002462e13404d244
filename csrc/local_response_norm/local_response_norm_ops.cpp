// local_response_norm as PyTorch operators on the CPU: checks, layout, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "local_response_norm_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  return on_pixels(x, {size, alpha, beta, k}, [](const LocalResponseNorm& p, const Tensor& in, Tensor& y) {
    on_cpu(local_response_norm_units(p), [&](auto isa, int64_t begin, int64_t end) {
      local_response_norm_cpu<isa.value>(p, in.data_ptr(), y.data_ptr(), begin, end);
    });
  });
}

Tensor backward(const Tensor& dy, const Tensor& x, int64_t size, double alpha, double beta, double k) {
  return on_pixels(dy, x, {size, alpha, beta, k},
                   [](const LocalResponseNorm& p, const Tensor& gradient, const Tensor& in, Tensor& dx) {
                     on_cpu(local_response_norm_units(p), [&](auto isa, int64_t begin, int64_t end) {
                       local_response_norm_backward_cpu<isa.value>(p, gradient.data_ptr(), in.data_ptr(), dx.data_ptr(),
                                                                   begin, end);
                     });
                   });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&alexnet_ext::forward));
  m.impl("local_response_norm_backward", TORCH_BOX(&alexnet_ext::backward));
}
