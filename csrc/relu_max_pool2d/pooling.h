// Pooling arguments at the boundary, shared by the ops that pool.
#pragma once

#include "../common/tensor.h"
#include "relu_max_pool2d.h"

namespace alexnet_ext {

using IntList = std::vector<int64_t>;

inline Pooling pooling_of(const IntList& kernel, const IntList& stride, const IntList& padding,
                          const IntList& dilation) {
  Pooling pool;
  for (int i = 0; i < 2; ++i) {
    pool.kernel[i] = kernel.at(i);
    pool.stride[i] = stride.at(i);
    pool.padding[i] = padding.at(i);
    pool.dilation[i] = dilation.at(i);
    check(pool.kernel[i] > 0 && pool.kernel[i] <= kMaxTaps, "kernel_size must be from 1 to ", kMaxTaps, ", got ",
          pool.kernel[i]);
    check(pool.stride[i] > 0, "stride must be at least 1, got ", pool.stride[i]);
    check(pool.padding[i] >= 0 && pool.padding[i] <= pool.kernel[i] / 2,
          "padding must be at most half of kernel_size, got ", pool.padding[i]);
    check(pool.dilation[i] > 0 && pool.dilation[i] <= INT32_MAX, "dilation must be from 1 to 2^31 - 1, got ",
          pool.dilation[i]);
  }
  check(pool.kernel[0] * pool.kernel[1] <= kMaxTaps, "kernel_size must have at most ", kMaxTaps, " values, got ",
        pool.kernel[0], " x ", pool.kernel[1]);
  return pool;
}

// The output's sizes (the rule of torch.nn.MaxPool2d; the same as pooled_size in alexnet_ext/ops/_checks.py).
inline Images pooled(const Images& in, const Pooling& pool, bool ceil_mode) {
  Images out = in;
  int64_t sides[2] = {in.height, in.width};
  for (int i = 0; i < 2; ++i) {
    int64_t reach = sides[i] + 2 * pool.padding[i] - pool.dilation[i] * (pool.kernel[i] - 1) - 1;
    check(reach >= 0, "kernel_size ", pool.kernel[i], " with dilation ", pool.dilation[i], " does not fit a side of ",
          sides[i]);
    int64_t length = (reach + (ceil_mode ? pool.stride[i] - 1 : 0)) / pool.stride[i] + 1;
    if (ceil_mode && (length - 1) * pool.stride[i] >= sides[i] + pool.padding[i]) --length;
    sides[i] = length;
  }
  out.height = sides[0];
  out.width = sides[1];
  return out;
}

inline void check_winners(const Tensor& winners, const Tensor& dy) {
  check(winners.scalar_type() == ScalarType::Byte, "winners must be uint8");
  check_shape(dy, "dy", {winners.size(0), winners.size(1), winners.size(2), winners.size(3)});
}

// Images of the input that pooled to `out`; height and width must pool to out's.
inline Images unpooled(const Images& out, int64_t height, int64_t width, const Pooling& pool) {
  check(height > 0 && width > 0, "height and width must be at least 1, got ", height, " x ", width);
  Images in = out;
  in.height = height;
  in.width = width;
  Images down = pooled(in, pool, false), up = pooled(in, pool, true);
  check(out.height >= down.height && out.height <= up.height && out.width >= down.width && out.width <= up.width,
        "winners has height and width ", out.height, " x ", out.width, ", expected ", down.height, " x ", down.width,
        " for an input of ", height, " x ", width);
  return in;
}

}  // namespace alexnet_ext
