// Bias + ReLU + max pooling + LRN, CaffeNet's order: launchers, free of PyTorch.
//
//   pooled = max pool of relu(x + bias), winners as in relu_max_pool2d;  y = lrn(pooled)
//   dx = unpool(lrn'(dy)); backward needs pooled, a quarter of x at window 3 and stride 2, and not x
#pragma once

#include "../relu_lrn_max_pool2d/relu_lrn_max_pool2d.h"

namespace alexnet_ext {

template <Isa isa>
void relu_max_pool2d_lrn_cpu(const LrnPoolBlock& p, const void* x, const void* bias, void* y, void* pooled,
                             uint8_t* winners, int64_t begin, int64_t end);

// bias_sums as in relu_lrn_max_pool2d_backward_cpu.
template <Isa isa>
void relu_max_pool2d_lrn_backward_cpu(const LrnPoolBlock& p, const void* dy, const void* pooled, const uint8_t* winners,
                                      void* dx, void* bias_sums, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); each returns a cudaError_t. bias_sums as in
// relu_lrn_max_pool2d_backward_cuda.
int relu_max_pool2d_lrn_cuda(const LrnPoolBlock& p, const void* x, const void* bias, void* y, void* pooled,
                             uint8_t* winners, void* stream);

// The backward of any LRN except AlexNet's, and of other windows over contiguous images, needs dpooled: a workspace of
// p.out's elements, in the type of bias_sums. If it is not needed it must be null.
bool relu_max_pool2d_lrn_needs_dpooled(const LrnPoolBlock& p, const void* dy, const void* pooled,
                                       const uint8_t* winners, const void* dx);
int relu_max_pool2d_lrn_backward_cuda(const LrnPoolBlock& p, const void* dy, const void* pooled, const uint8_t* winners,
                                      void* dx, void* dpooled, void* bias_sums, void* dbias, void* stream);

}  // namespace alexnet_ext
