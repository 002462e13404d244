// A step of stochastic gradient descent for a list of tensors, in one pass, free of PyTorch. For each element
//
//   g = gradient / grad_scale                       negated if maximize
//   g = weight_decay * parameter + g                unless weight_decay is 0
//   momentum = (1 - dampening) * g + (mu * momentum)      g at the first step; left out if mu is 0
//   u = momentum                                    nesterov: mu * momentum + g; if mu is 0: g
//   parameter = -lr * u + parameter
//   weight = parameter, rounded to nearest even
//
// in the arithmetic type. Each line is one fused multiply-add, as in PyTorch's vectors; the product in brackets is
// rounded before. So every kernel gives the same bits, except the portable CPU's, which rounds each product.
//
// Bytes an element with bf16 gradients: gradient 2, weight 2, parameter and momentum 8 each: 20.
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

struct SgdStep {
  DType dtype;  // of gradients and weights; parameters and momenta have its arithmetic type
  double lr, mu, dampening, weight_decay;
  bool nesterov, maximize, first_step;
  // Each one number where the tensors are, or null. lr_tensor takes the place of lr. If found_inf is not 0, nothing is
  // written.
  const float *lr_tensor, *grad_scale, *found_inf;
};

// One tensor of `size` elements, all of its buffers dense and in the same order. momentum is null if mu is 0. weight
// may be null.
struct SgdTensor {
  void *parameter, *momentum;
  const void* gradient;
  void* weight;
  int64_t size;
};

// CPU units: runs of this many elements of one tensor.
constexpr int64_t kSgdRun = 1 << 14;

inline int64_t sgd_step_units(const SgdTensor& tensor) { return ceil_div(tensor.size, kSgdRun); }

// Units are counted over all `count` tensors.
template <Isa isa>
void sgd_step_cpu(const SgdStep& step, const SgdTensor* tensors, int64_t count, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); returns a cudaError_t. One launch for each kSgdTensors tensors.
constexpr int kSgdTensors = 64;

int sgd_step_cuda(const SgdStep& step, const SgdTensor* tensors, int64_t count, void* stream);

}  // namespace alexnet_ext
