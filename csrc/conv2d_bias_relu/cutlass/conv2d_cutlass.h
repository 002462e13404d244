// conv2d_bias_relu on tensor cores by CUTLASS's implicit products, free of PyTorch and of CUTLASS: the problem, each
// group's slice of it, and the launchers.
#pragma once

#include "../conv2d_bias_relu.h"

namespace alexnet_ext {

// All tensors are dense and channels-last: x of (batch, channels, height, width), y of (batch, filters, out_height,
// out_width), weight of (filters, channels / groups, taps_h, taps_w), which lies in memory as taps of channels.
struct Conv2d {
  int64_t batch, channels, height, width;
  int64_t filters, taps_h, taps_w;
  int64_t out_height, out_width;
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t taps() const { return taps_h * taps_w * group_channels(); }  // of a filter
  int64_t pixels() const { return batch * out_height * out_width; }    // of y
};

// Where a group begins in each tensor, in elements. From there on a pixel of x is `channels` away from the next one,
// and one of y `filters`, as in the whole tensor: nothing is copied.
struct Conv2dSlice {
  int64_t x, weight, y;  // and in a bias as in y's pixel
};

inline Conv2dSlice slice_of(const Conv2d& p, int64_t group) {
  return {group * p.group_channels(), group * p.group_filters() * p.taps(), group * p.group_filters()};
}

// The weight gradient is a product of [group_filters][pixels] and [pixels][taps], of which a block computes this
// many results a side. Its pixels are split, this many or more to a split, so that the blocks of a launch fill a GPU.
constexpr int64_t kWeightBlock = 128, kFewestPixels = 1024, kMostBlocks = 2 * 132;

// It hangs on the shape alone, so that the same input gives the same bits on every GPU.
inline int64_t weight_gradient_splits(const Conv2d& p) {
  const int64_t blocks = ceil_div(p.group_filters(), kWeightBlock) * ceil_div(p.taps(), kWeightBlock);
  const int64_t by_blocks = kMostBlocks / blocks, by_pixels = ceil_div(p.pixels(), kFewestPixels);
  const int64_t splits = by_blocks < by_pixels ? by_blocks : by_pixels;
  return splits > 1 ? splits : 1;
}

// Workspace of the weight gradient, in floats: [groups][splits][group_filters][taps].
inline int64_t weight_gradient_workspace(const Conv2d& p) { return weight_gradient_splits(p) * p.filters * p.taps(); }

// The same for compute capability 9.0, where a block has a multiprocessor to itself and computes so many filters x
// columns, each a tap's so many channels, in steps of so many pixels. A split of the pixels has 16 steps or more.
constexpr int kSm90WeightFilters = 128, kSm90WeightColumns = 4, kSm90WeightChannels = 64, kSm90WeightPixels = 64;

struct Sm90WeightPlan {
  int64_t channel_blocks, column_blocks, filter_blocks, steps, splits, steps_of_split;

  explicit Sm90WeightPlan(const Conv2d& p) {
    channel_blocks = ceil_div(p.group_channels(), kSm90WeightChannels);
    column_blocks = ceil_div(p.taps_h * p.taps_w * channel_blocks, kSm90WeightColumns);
    filter_blocks = ceil_div(p.group_filters(), kSm90WeightFilters);
    steps = ceil_div(p.pixels(), kSm90WeightPixels);
    const int64_t by_blocks = kMostBlocks / 2 / (column_blocks * filter_blocks * p.groups), by_steps = steps / 16;
    const int64_t wanted = by_blocks < by_steps ? by_blocks : by_steps;
    steps_of_split = ceil_div(steps, wanted > 1 ? wanted : 1);
    splits = ceil_div(steps, steps_of_split);
  }
};

// [splits][filters][taps] floats.
inline int64_t sm90_weight_gradient_workspace(const Conv2d& p) {
  return Sm90WeightPlan(p).splits * p.filters * p.taps();
}

// Asynchronous on `stream` (a cudaStream_t); return a cudaError_t, cudaErrorInvalidValue for what CUTLASS cannot do.
// T is bf16, f16 or float, whose products are of TF32; sums are fp32. Pointers are aligned to 16 bytes, and so are the
// channels of a group. alexnet_ext/ops/conv2d_bias_relu/cutlass.py says where they apply.

// y = convolution of x with weight + bias, with relu max(0, .) of it, NaN kept; a null bias adds nothing.
template <class T>
int conv2d_forward_cutlass(const Conv2d& p, const void* x, const void* weight, const void* bias, bool relu, void* y,
                           void* stream);

// dx; the stride is 1.
template <class T>
int conv2d_input_gradient_cutlass(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream);

// dweight, summed up in one order and rounded once.
template <class T>
int conv2d_weight_gradient_cutlass(const Conv2d& p, const void* dz, const void* x, void* workspace, void* dweight,
                                   void* stream);

// The same for compute capability 9.0 alone (conv2d_sm90.cuh, weight_gradient_sm90.cuh), at stride 1. wgmma reads TF32
// along the summed dimension only, which channels are in the forward alone: the gradients are of bf16 and f16.
template <class T>
int conv2d_forward_sm90(const Conv2d& p, const void* x, const void* weight, const void* bias, bool relu, void* y,
                        void* stream);
template <class T>
int conv2d_input_gradient_sm90(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream);
template <class T>
int conv2d_weight_gradient_sm90(const Conv2d& p, const void* dz, const void* x, void* workspace, void* dweight,
                                void* stream);

}  // namespace alexnet_ext
