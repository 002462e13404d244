// Checks of pooling arguments at the boundary, and sizes of pooled images, for every op that pools.
#pragma once

#include "../relu_max_pool2d/relu_max_pool2d.h"
#include "tensor.h"

namespace alexnet_ext {

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

// The images that `in` pools to.
inline Images pooled(const Images& in, const Pooling& pool, bool ceil_mode) {
  Images out = in;
  out.height = pooled_length(in.height, pool, 0, ceil_mode);
  out.width = pooled_length(in.width, pool, 1, ceil_mode);
  check(out.height > 0 && out.width > 0, "kernel_size ", pool.kernel[0], " x ", pool.kernel[1],
        " leaves nothing of an input of ", in.height, " x ", in.width);
  return out;
}

inline void check_winners(const Tensor& winners, const Tensor& dy) {
  check(winners.scalar_type() == ScalarType::Byte, "winners must be uint8");
  check_device(winners, "winners", dy);
  check_shape(dy, "dy", {winners.size(0), winners.size(1), winners.size(2), winners.size(3)});
}

// The images of `height` x `width` that pooled to `out`. Throws where such images pool to another size.
inline Images unpooled(const Images& out, int64_t height, int64_t width, const Pooling& pool) {
  check(height > 0 && width > 0, "height and width must be at least 1, got ", height, " x ", width);
  Images in = out;
  in.height = height;
  in.width = width;
  const int64_t sides[] = {height, width}, lengths[] = {out.height, out.width};
  for (int i = 0; i < 2; ++i) {
    int64_t down = pooled_length(sides[i], pool, i, false), up = pooled_length(sides[i], pool, i, true);
    check(lengths[i] >= down && lengths[i] <= up, "winners has ", i == 0 ? "height " : "width ", lengths[i],
          ", expected ", down, " to ", up, " for an input of ", height, " x ", width);
  }
  return in;
}

}  // namespace alexnet_ext
