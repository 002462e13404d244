// sgd_step as a PyTorch operator on CUDA. It runs on the parameters' device and its current stream, and checks the
// launch.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "sgd_step_plan.h"

namespace alexnet_ext {
namespace {

void forward(TensorList parameters, TensorList momenta, TensorList gradients, TensorList weights, double lr,
             double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step,
             const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
             const std::optional<Tensor>& found_inf) {
  if (parameters.empty()) return;
  CudaStream stream(parameters[0]);
  on_lists(parameters, momenta, std::move(gradients), weights,
           {{}, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step, {}, {}, {}}, lr_tensor,
           grad_scale, found_inf, [&](const SgdStep& step, const SgdTensor* tensors, int64_t count) {
             stream.check("sgd_step", sgd_step_cuda(step, tensors, count, stream.get()));
           });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) { m.impl("sgd_step", TORCH_BOX(&alexnet_ext::forward)); }
