// conv2d_bias_relu for compute capability 9.0 alone: launchers, and how the weight gradient is split. Free of PyTorch
// and of CUTLASS.
#pragma once

#include "../conv2d.h"

namespace alexnet_ext {

// A block of the weight gradient has a multiprocessor to itself. It computes 128 filters x 4 columns; a column is 64
// channels of one tap. One step covers 64 pixels.
constexpr int kSm90WeightFilters = 128, kSm90WeightColumns = 4, kSm90WeightChannels = 64, kSm90WeightPixels = 64;
// A split of the pixels has at least this many steps.
constexpr int kSm90WeightSteps = 16;

struct Sm90WeightPlan {
  int64_t channel_blocks, column_blocks, filter_blocks, steps, splits, steps_of_split;

  explicit Sm90WeightPlan(const Conv2d& p) {
    channel_blocks = ceil_div(p.group_channels(), kSm90WeightChannels);
    column_blocks = ceil_div(p.taps_h * p.taps_w * channel_blocks, kSm90WeightColumns);
    filter_blocks = ceil_div(p.group_filters(), kSm90WeightFilters);
    steps = ceil_div(p.pixels(), kSm90WeightPixels);
    const int64_t by_blocks = kHopperMultiprocessors / (column_blocks * filter_blocks * p.groups);
    const int64_t by_steps = steps / kSm90WeightSteps, most = by_blocks < by_steps ? by_blocks : by_steps;
    steps_of_split = ceil_div(steps, most > 1 ? most : 1);
    splits = ceil_div(steps, steps_of_split);
  }
};

// Workspace of the weight gradient, in floats: [splits][filters][taps].
inline int64_t sm90_weight_gradient_workspace(const Conv2d& p) {
  return Sm90WeightPlan(p).splits * p.filters * p.taps();
}

// As in conv2d_cutlass.h, at stride 1. wgmma reads TF32 operands along the summed dimension only, which must be
// contiguous. In the forward these are the channels; in the gradients they are others, so there T is bf16 or f16.
template <class T>
int conv2d_forward_sm90(const Conv2d& p, const void* x, const void* weight, const void* bias, bool relu, void* y,
                        void* stream);
template <class T>
int conv2d_input_gradient_sm90(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream);
template <class T>
int conv2d_weight_gradient_sm90(const Conv2d& p, const void* dz, const void* x, void* workspace, void* dweight,
                                void* stream);

}  // namespace alexnet_ext
