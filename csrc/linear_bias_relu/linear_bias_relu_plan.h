// Checks, layout and allocation of linear_bias_relu for every device.
#pragma once

#include "../common/tensor.h"
#include "linear_bias_relu.h"

namespace alexnet_ext {

inline void check_rank(const Tensor& t, const char* name) {
  check(t.dim() == 2, name, " has shape ", shape_text(t), ", expected 2D");
}

inline LinearBiasRelu plan(const Tensor& x, const Tensor& weight) {
  const DType dtype = dtype_of(x, "x");
  check_rank(x, "x");
  check_rank(weight, "weight");
  check_like(weight, "weight", x);
  check_shape(weight, "weight", {weight.size(0), x.size(1)});
  return {dtype, x.size(0), x.size(1), weight.size(0)};
}

inline LinearBiasRelu plan_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y) {
  const LinearBiasRelu p = plan(x, weight);
  for (auto [t, name] : {std::pair{&dy, "dy"}, std::pair{&y, "y"}}) {
    check_like(*t, name, x);
    check_shape(*t, name, {p.rows, p.outputs});
  }
  return p;
}

inline Tensor rows_of(const Tensor& t) { return torch::stable::contiguous(t); }

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes) {
  return fresh(torch::stable::new_empty(like, {sizes.data(), sizes.size()}));
}

}  // namespace alexnet_ext
