// relu_max_pool2d_lrn as PyTorch operators on the CPU.
#include <torch/csrc/stable/library.h>

#include "relu_max_pool2d_lrn_plan.h"

namespace alexnet_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> bias, int64_t lrn_size, double alpha,
                                           double beta, double k, IntList kernel, IntList stride) {
  return on_pool_then_lrn(
      x, bias, {lrn_size, alpha, beta, k}, kernel, stride,
      [](const LrnPoolBlock& p, const void* in, const void* b, void* y, void* kept, uint8_t* winners) {
        on_cpu(band_count(p.out), [&](auto isa, int64_t begin, int64_t end) {
          relu_max_pool2d_lrn_cpu<isa.value>(p, in, b, y, kept, winners, begin, end);
        });
      });
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& kept, const Tensor& winners, int64_t height,
                                    int64_t width, int64_t lrn_size, double alpha, double beta, double k,
                                    IntList kernel, IntList stride) {
  return on_pool_then_lrn_backward(
      dy, kept, winners, height, width, {lrn_size, alpha, beta, k}, kernel, stride,
      [&](const LrnPoolBlock& p, const void* gradient, const void* activation, const uint8_t* taps, void* dx) {
        BiasSums sums(p);
        on_cpu(band_count(p.in), [&](auto isa, int64_t begin, int64_t end) {
          relu_max_pool2d_lrn_backward_cpu<isa.value>(p, gradient, activation, taps, dx, sums.data(), begin, end);
        });
        return sums.total(kept);
      });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("relu_max_pool2d_lrn", TORCH_BOX(&alexnet_ext::forward));
  m.impl("relu_max_pool2d_lrn_backward", TORCH_BOX(&alexnet_ext::backward));
}
