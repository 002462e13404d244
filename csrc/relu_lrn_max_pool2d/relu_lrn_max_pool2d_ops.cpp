// relu_lrn_max_pool2d as PyTorch operators on the CPU.
#include <torch/csrc/stable/library.h>

#include "relu_lrn_max_pool2d_plan.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> bias, int64_t lrn_size, double alpha,
                                   double beta, double k, IntList kernel, IntList stride) {
  return on_lrn_then_pool(x, bias, {lrn_size, alpha, beta, k}, kernel, stride,
                          [](const LrnPoolBlock& p, const void* in, const void* b, void* y, uint8_t* winners) {
                            on_cpu(band_count(p.out), [&](auto isa, int64_t begin, int64_t end) {
                              relu_lrn_max_pool2d_cpu<isa.value>(p, in, b, y, winners, begin, end);
                            });
                          });
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> bias,
                                    const Tensor& winners, int64_t lrn_size, double alpha, double beta, double k,
                                    IntList kernel, IntList stride) {
  return on_lrn_then_pool_backward(
      dy, x, bias, winners, {lrn_size, alpha, beta, k}, kernel, stride,
      [&](const LrnPoolBlock& p, const void* gradient, const void* in, const void* b, const uint8_t* taps, void* dx) {
        BiasSums sums(p);
        on_cpu(band_count(p.in), [&](auto isa, int64_t begin, int64_t end) {
          relu_lrn_max_pool2d_backward_cpu<isa.value>(p, gradient, in, b, taps, dx, sums.data(), begin, end);
        });
        return sums.total(x);
      });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_lrn_max_pool2d_backward", TORCH_BOX(&alexnet_ext::backward));
}
