// A convolution as loops over what meets, for the tests of the one by CUTLASS.
#pragma once

#include "conv2d_bias_relu/conv2d_cutlass.h"
#include "harness.h"

namespace alexnet_ext::test {

using Values = std::vector<int64_t>;  // small integers, whose sums are exact

inline Values random_values(Random& random, int64_t n) {
  Values values(n);
  for (int64_t& value : values) value = integer(random, -8, 8);
  return values;
}

// f(pixel of y, its place in x, tap) for all that meet within the image; places are numbers of pixels.
template <class F>
void for_meetings(const Conv2d& p, F&& f) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t i = 0; i < p.out_height * p.out_width; ++i)
      for (int64_t tap = 0; tap < p.taps_h * p.taps_w; ++tap) {
        const int64_t h = i / p.out_width * p.stride[0] + tap / p.taps_w * p.dilation[0] - p.padding[0];
        const int64_t w = i % p.out_width * p.stride[1] + tap % p.taps_w * p.dilation[1] - p.padding[1];
        if (h < 0 || h >= p.height || w < 0 || w >= p.width) continue;
        f(n * p.out_height * p.out_width + i, (n * p.height + h) * p.width + w, tap);
      }
}

inline Conv2d problem(int64_t batch, int64_t channels, int64_t side, int64_t filters, int64_t taps, int64_t stride,
                      int64_t padding, int64_t dilation, int64_t groups) {
  const int64_t out = (side + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
  return {batch,
          channels,
          side,
          side,
          filters,
          taps,
          taps,
          out,
          out,
          {stride, stride},
          {padding, padding},
          {dilation, dilation},
          groups};
}

// AlexNet's at batch 128, the first one with its space brought to depth.
inline std::vector<Conv2d> alexnet_layers() {
  return {problem(128, 48, 57, 96, 3, 1, 0, 1, 1), problem(128, 96, 27, 256, 5, 1, 2, 1, 2),
          problem(128, 256, 13, 384, 3, 1, 1, 1, 1), problem(128, 384, 13, 384, 3, 1, 1, 1, 2),
          problem(128, 384, 13, 256, 3, 1, 1, 1, 2)};
}

}  // namespace alexnet_ext::test
