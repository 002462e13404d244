// sgd_step as a PyTorch operator on the CPU.
#include <torch/csrc/stable/library.h>

#include "sgd_step_plan.h"

namespace alexnet_ext {
namespace {

void forward(TensorList parameters, TensorList momenta, TensorList gradients, TensorList weights, double lr,
             double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step,
             const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
             const std::optional<Tensor>& found_inf) {
  on_lists(parameters, momenta, std::move(gradients), weights,
           {{}, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step, {}, {}, {}}, lr_tensor,
           grad_scale, found_inf, [](const SgdStep& step, const SgdTensor* tensors, int64_t count) {
             int64_t units = 0;
             for (int64_t t = 0; t < count; ++t) units += sgd_step_units(tensors[t]);
             on_cpu(units, [&](auto isa, int64_t begin, int64_t end) {
               sgd_step_cpu<isa.value>(step, tensors, count, begin, end);
             });
           });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) { m.impl("sgd_step", TORCH_BOX(&alexnet_ext::forward)); }
