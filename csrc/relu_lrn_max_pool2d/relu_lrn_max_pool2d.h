// Bias + ReLU + LRN + max pooling, the order of the 2012 paper: parameters and launchers, free of PyTorch.
//
//   y = max pool of lrn(relu(x + bias)); winners as in relu_max_pool2d, but every window has one
//   dx = relu'(x + bias) * lrn'(unpool(dy)); backward recomputes ReLU and LRN from x, the convolution's output
#pragma once

#include "../local_response_norm/local_response_norm.h"
#include "../relu_max_pool2d/relu_max_pool2d.h"

namespace alexnet_ext {

// The parameters of both fused blocks. They pool without padding and dilation.
struct LrnPoolBlock {
  DType dtype;
  Images in, out;  // the same batch, channels and layout
  Pooling pool;
  Lrn lrn;
};

// CPU units: bands of rows; of the output forward, of the input backward.
template <Isa isa>
void relu_lrn_max_pool2d_cpu(const LrnPoolBlock& p, const void* x, const void* bias, void* y, uint8_t* winners,
                             int64_t begin, int64_t end);

// bias_sums, [units][channels] in fp32 (fp64 for fp64), is each unit's sum of dx. The caller adds the units in order.
template <Isa isa>
void relu_lrn_max_pool2d_backward_cpu(const LrnPoolBlock& p, const void* dy, const void* x, const void* bias,
                                      const uint8_t* winners, void* dx, void* bias_sums, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); each returns a cudaError_t. bias_sums is a workspace of
// [sum_rows_of(p.in)][channels] in fp32 (fp64 for fp64).
int relu_lrn_max_pool2d_cuda(const LrnPoolBlock& p, const void* x, const void* bias, void* y, uint8_t* winners,
                             void* stream);
int relu_lrn_max_pool2d_backward_cuda(const LrnPoolBlock& p, const void* dy, const void* x, const void* bias,
                                      const uint8_t* winners, void* dx, void* bias_sums, void* dbias, void* stream);

}  // namespace alexnet_ext
