// The convolution for compute capability 9.0 as PyTorch operators. ../cutlass has those for 8.0 and newer. TF32 has no
// gradients here (conv2d_sm90.h).
#include <torch/csrc/stable/library.h>

#include "../conv2d_binding.h"
#include "conv2d_sm90.h"

namespace alexnet_ext {
namespace {

struct Sm90 {
  static constexpr auto kForwardName = "conv2d_forward_sm90", kGradientName = "conv2d_gradient_sm90";
  template <class T>
  static constexpr bool kForward = true;
  template <class T>
  static constexpr bool kGradients = sizeof(T) == 2;

  static int64_t workspace(const Conv2d& p) { return sm90_weight_gradient_workspace(p); }
  template <class T, class... Given>
  static int forward(const Given&... given) {
    return conv2d_forward_sm90<T>(given...);
  }
  template <class T, class... Given>
  static int input_gradient(const Given&... given) {
    return conv2d_input_gradient_sm90<T>(given...);
  }
  template <class T, class... Given>
  static int weight_gradient(const Given&... given) {
    return conv2d_weight_gradient_sm90<T>(given...);
  }
};

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) {
  m.impl("conv2d_bias_relu_sm90", TORCH_BOX(&alexnet_ext::forward_by<alexnet_ext::Sm90>));
  m.impl("conv2d_bias_relu_sm90_gradient", TORCH_BOX(&alexnet_ext::gradient_by<alexnet_ext::Sm90>));
}
