// Checks of sgd_step for every device; `launch` runs the device's kernel.
#pragma once

#include <string>

#include "../common/tensor.h"
#include "sgd_step.h"

namespace alexnet_ext {

using TensorList = std::vector<Tensor>;

// Whether the elements fill a block of memory, in whatever order.
inline bool is_dense(const Tensor& t) {
  for (int64_t done = 1, d = 0; done < t.numel(); done *= t.size(d)) {
    for (d = 0; d < t.dim() && (t.size(d) == 1 || t.stride(d) != done);) ++d;
    if (d == t.dim()) return false;
  }
  return true;
}

// What is written: like the parameter, element by element.
inline void* updated(const TensorList& list, size_t i, const char* name, ScalarType dtype, const Tensor& parameter) {
  if (list.empty()) return nullptr;
  const Tensor& t = list[i];
  check(t.scalar_type() == dtype, name, "[", i, "] must be of the dtype of ",
        dtype == parameter.scalar_type() ? "parameters" : "gradients");
  check_shape(t, name, std::vector<int64_t>(parameter.sizes().begin(), parameter.sizes().end()));
  check_device(t, name, parameter, "parameters");
  check(same_strides(t, parameter), name, "[", i, "] must have the strides of its parameter");
  return t.data_ptr();
}

// The data of a tensor of one fp32 number, null if there is none.
inline const float* number(const std::optional<Tensor>& t, const char* name, const Tensor& parameter) {
  if (!t) return nullptr;
  check(t->scalar_type() == ScalarType::Float && t->numel() == 1, name, " must be one number of float32");
  check_device(*t, name, parameter, "parameters");
  return static_cast<const float*>(t->data_ptr());
}

// Checks the lists, and has launch(step, tensors, count) update them. A gradient of other strides is copied.
template <class Launch>
inline void on_lists(const TensorList& parameters, const TensorList& momenta, TensorList gradients,
                     const TensorList& weights, SgdStep step, const std::optional<Tensor>& lr_tensor,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, Launch&& launch) {
  const size_t count = parameters.size();
  check(gradients.size() == count, "gradients has ", gradients.size(), " tensors, expected ", count);
  check(momenta.size() == (step.mu == 0 ? 0 : count), "momenta has ", momenta.size(), " tensors, expected ",
        step.mu == 0 ? 0 : count);
  check(weights.empty() || weights.size() == count, "weights has ", weights.size(), " tensors, expected 0 or ", count);
  if (count == 0) return;
  const ScalarType dtype = gradients[0].scalar_type();
  step.dtype = dtype_of(gradients[0], "gradients");
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  step.lr_tensor = number(lr_tensor, "lr_tensor", parameters[0]);
  step.grad_scale = number(grad_scale, "grad_scale", parameters[0]);
  step.found_inf = number(found_inf, "found_inf", parameters[0]);
  std::vector<SgdTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& parameter = parameters[i];
    Tensor& gradient = gradients[i];
    check(parameter.scalar_type() == wide, "parameters[", i, "] must be ",
          wide == ScalarType::Double ? "float64" : "float32", " with such gradients");
    check(is_dense(parameter), "parameters[", i, "] must be dense");
    check_device(parameter, "parameters", parameters[0], "parameters[0]");
    check(gradient.scalar_type() == dtype, "gradients[", i, "] must be of the dtype of gradients[0]");
    check_shape(gradient, "gradients", std::vector<int64_t>(parameter.sizes().begin(), parameter.sizes().end()));
    check_device(gradient, "gradients", parameter, "parameters");
    if (!same_strides(gradient, parameter)) {
      Tensor copy = torch::stable::to(torch::stable::empty_like(parameter), dtype);
      torch::stable::copy_(copy, gradient);
      gradient = copy;
    }
    tensors.push_back({parameter.data_ptr(), updated(momenta, i, "momenta", wide, parameter), gradient.data_ptr(),
                       updated(weights, i, "weights", dtype, parameter), parameter.numel()});
  }
  launch(step, tensors.data(), static_cast<int64_t>(count));
}

}  // namespace alexnet_ext
