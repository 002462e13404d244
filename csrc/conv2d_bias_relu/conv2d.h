// A convolution on tensor cores: its sizes, and each group's slice of the tensors. Free of PyTorch and of CUTLASS.
#pragma once

#include "conv2d_bias_relu.h"

namespace alexnet_ext {

// All tensors are dense and channels-last: x of (batch, channels, height, width), y of (batch, filters, out_height,
// out_width), weight of (filters, channels / groups, taps_h, taps_w). In memory a filter is [taps_h][taps_w][channels
// of a group].
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

// Where a group begins in each tensor, in elements. The strides are those of the whole tensor, so nothing is copied: a
// pixel of x is `channels` away from the next one, and a pixel of y `filters`.
struct Conv2dSlice {
  int64_t x, weight, y;  // a bias is indexed as a pixel of y
};

inline Conv2dSlice slice_of(const Conv2d& p, int64_t group) {
  return {group * p.group_channels(), group * p.group_filters() * p.taps(), group * p.group_filters()};
}

}  // namespace alexnet_ext
