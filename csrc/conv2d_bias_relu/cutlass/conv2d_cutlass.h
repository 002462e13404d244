// conv2d_bias_relu as CUTLASS's implicit products for compute capability 8.0 and newer: launchers, and how the weight
// gradient is split. Free of PyTorch and of CUTLASS.
#pragma once

#include "../conv2d.h"

namespace alexnet_ext {

// The weight gradient is a product of [group_filters][pixels] and [pixels][taps]. A block computes kWeightBlock x
// kWeightBlock results. The pixels are split so that the blocks of a launch fill a GPU: at most kMostBlocks blocks, at
// least kFewestPixels pixels a split.
constexpr int64_t kWeightBlock = 128, kFewestPixels = 1024, kMostBlocks = 2 * kHopperMultiprocessors;

// Depends on the shape alone, so that the same input gives the same bits on every GPU.
inline int64_t weight_gradient_splits(const Conv2d& p) {
  const int64_t blocks = ceil_div(p.group_filters(), kWeightBlock) * ceil_div(p.taps(), kWeightBlock);
  const int64_t by_blocks = kMostBlocks / blocks, by_pixels = ceil_div(p.pixels(), kFewestPixels);
  const int64_t splits = by_blocks < by_pixels ? by_blocks : by_pixels;
  return splits > 1 ? splits : 1;
}

// Workspace of the weight gradient, in floats: [groups][splits][group_filters][taps].
inline int64_t weight_gradient_workspace(const Conv2d& p) { return weight_gradient_splits(p) * p.filters * p.taps(); }

// Asynchronous on `stream` (a cudaStream_t). Each returns a cudaError_t, cudaErrorInvalidValue for a problem that
// CUTLASS refuses. T is bf16, f16 or float; the products of float are TF32, sums are fp32. Pointers and the channels of
// a group are aligned to 16 bytes. alexnet_ext/ops/conv2d_bias_relu/cutlass.py says where they apply.

// y = convolution of x with weight + bias, with relu max(0, .) of it, NaN kept; a null bias adds nothing.
template <class T>
int conv2d_forward_cutlass(const Conv2d& p, const void* x, const void* weight, const void* bias, bool relu, void* y,
                           void* stream);

// dx; the stride is 1.
template <class T>
int conv2d_input_gradient_cutlass(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream);

// dweight, summed in one order and rounded once.
template <class T>
int conv2d_weight_gradient_cutlass(const Conv2d& p, const void* dz, const void* x, void* workspace, void* dweight,
                                   void* stream);

}  // namespace alexnet_ext
