// Parameters and checks of conv2d_bias_relu that the bindings of the CPU and of CUDA share.
#pragma once

#include <array>

#include "../common/tensor.h"
#include "conv2d_bias_relu.h"

namespace alexnet_ext {

struct Convolution {
  IntList stride, padding, dilation;
  int64_t groups;
};

// The dtype of x; weight and bias must have it too. PyTorch's convolution checks the rest.
inline DType check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType dtype = dtype_of(x, "x");
  check_like(weight, "weight", x);
  if (bias) bias_data(bias, x, weight.size(0));
  return dtype;
}

inline void check_backward(const Tensor& dy, const Tensor& x, const Tensor& y) {
  check_like(dy, "dy", x);
  check_like(y, "y", x);
  check_shape(dy, "dy", {y.sizes().begin(), y.sizes().end()});
}

}  // namespace alexnet_ext
