// The bias and ReLU after a convolution, free of PyTorch. Forward they work in place; backward ReLU's mask is applied
// to the gradient.
#pragma once

#include "../common/relu_mask.h"

namespace alexnet_ext {

// The lower bound of results: 0 with ReLU, -inf without.
constexpr float least_of(bool relu) { return relu ? 0.0f : -__builtin_huge_valf(); }

// CPU: y = max(0, y), NaN kept. relu_mask_cpu is the backward and has the same units.
template <Isa isa>
void relu_inplace_cpu(DType dtype, void* y, int64_t n, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); each returns a cudaError_t. y, dy and dz are dense in the layout of
// s.

// y = max(0, y + bias), NaN kept; a null bias adds nothing.
int bias_relu_cuda(DType dtype, const Images& s, void* y, const void* bias, void* stream);

// dz = dy where y > 0 or y is NaN, else 0. dbias = the sum of dz over all pixels of a channel. `sums` is a workspace of
// [sum_rows_of(s)][channels] in fp32 (fp64 for fp64). With sums and dbias null, dz alone is computed.
int relu_mask_cuda(DType dtype, const Images& s, const void* dy, const void* y, void* dz, void* sums, void* dbias,
                   void* stream);

// A first layer's weight (filters, channels, height, width), of any strides. Turned to depth it is (filters, channels *
// step * step, height / step, width / step), rounded up, channels-last: F.pixel_unshuffle after a pad of zeros.
struct DepthWeight {
  int64_t filters, channels, height, width, step, strides[4];
};

// From the weight to depth, or back.
int depth_weight_cuda(DType dtype, const DepthWeight& w, const void* from, void* to, bool back, void* stream);

}  // namespace alexnet_ext
