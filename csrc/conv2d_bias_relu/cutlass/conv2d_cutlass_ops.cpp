// CUTLASS's convolution as PyTorch operators: forward with bias and ReLU, and the gradient of x or weight. The gradient
// takes dz, the gradient before the ReLU.
#include <torch/csrc/stable/library.h>

#include "../conv2d_binding.h"
#include "conv2d_cutlass.h"

namespace alexnet_ext {
namespace {

struct Cutlass {
  static constexpr auto kForwardName = "conv2d_forward_cutlass", kGradientName = "conv2d_gradient_cutlass";
  // bf16 and fp16 have no kernels in a build for 9.0 alone, where those of ../sm90 take their place.
#ifdef ALEXNET_CUTLASS_TF32_ALONE
  template <class T>
  static constexpr bool kForward = sizeof(T) == 4;
#else
  template <class T>
  static constexpr bool kForward = true;
#endif
  template <class T>
  static constexpr bool kGradients = kForward<T>;

  static int64_t workspace(const Conv2d& p) { return weight_gradient_workspace(p); }
  template <class T, class... Given>
  static int forward(const Given&... given) {
    return conv2d_forward_cutlass<T>(given...);
  }
  template <class T, class... Given>
  static int input_gradient(const Given&... given) {
    return conv2d_input_gradient_cutlass<T>(given...);
  }
  template <class T, class... Given>
  static int weight_gradient(const Given&... given) {
    return conv2d_weight_gradient_cutlass<T>(given...);
  }
};

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_cutlass", TORCH_BOX(&alexnet_ext::forward_by<alexnet_ext::Cutlass>));
  m.impl("conv2d_bias_relu_cutlass_gradient", TORCH_BOX(&alexnet_ext::gradient_by<alexnet_ext::Cutlass>));
}
