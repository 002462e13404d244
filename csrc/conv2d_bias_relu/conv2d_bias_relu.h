// Bias and ReLU behind a convolution, free of PyTorch: in place forward, folded into the gradient backward.
#pragma once

#include "../common/relu_mask.h"

namespace alexnet_ext {

// What results are at least: max(0, .), or as they are.
constexpr float least_of(bool relu) { return relu ? 0.0f : -__builtin_huge_valf(); }

// CPU: y = max(0, y), NaN kept. Units are those of relu_mask_cpu, which is the backward.
template <Isa isa>
void relu_inplace_cpu(DType dtype, void* y, int64_t n, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); return a cudaError_t. y, dy and dz are dense in the layout of s.

// y = max(0, y + bias), NaN kept; a null bias adds nothing.
int bias_relu_cuda(DType dtype, const Images& s, void* y, const void* bias, void* stream);

// dz = dy where y > 0 or y is NaN, else 0, and dbias = its sum over all pixels of a channel, by way of `sums`, a
// workspace of [sum_rows_of(s)][channels] in fp32 (fp64 for fp64). Null sums and dbias: dz alone.
int relu_mask_cuda(DType dtype, const Images& s, const void* dy, const void* y, void* dz, void* sums, void* dbias,
                   void* stream);

}  // namespace alexnet_ext
