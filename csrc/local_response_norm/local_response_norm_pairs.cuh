// LRN with a window of five channels for a lane of eight, in the fewest instructions: the windows share the sums of
// pairs of neighbouring channels.
#pragma once

#include "local_response_norm_window.cuh"

namespace alexnet_ext {

// sum[c] = the sum of a * b over the channels c - 2 to c + 2: 21 instructions for the eight windows. The adjacent lanes
// give their outermost products and the sums of their outermost pairs. `first` and `last`: the lane holds the first or
// the last channels of its pixel.
__device__ inline void sums_of_five(float (&sum)[kLaneChannels], const float (&a)[kLaneChannels],
                                    const float (&b)[kLaneChannels], bool first, bool last) {
  static_assert(kLaneChannels == 8);
  constexpr unsigned kAll = 0xffffffff;
  const float low = a[0] * b[0], high = a[7] * b[7];
  const float pairs[] = {fmaf(a[1], b[1], low), fmaf(a[3], b[3], a[2] * b[2]), fmaf(a[5], b[5], a[4] * b[4]),
                         fmaf(a[6], b[6], high)};
  const float before = __shfl_up_sync(kAll, high, 1), pair_before = __shfl_up_sync(kAll, pairs[3], 1);
  const float after = __shfl_down_sync(kAll, low, 1), pair_after = __shfl_down_sync(kAll, pairs[0], 1);
  const float fours[] = {pairs[0] + pairs[1], pairs[1] + pairs[2], pairs[2] + pairs[3]};
  sum[0] = fmaf(a[2], b[2], (first ? 0 : pair_before) + pairs[0]);
  sum[1] = (first ? 0 : before) + fours[0];
  sum[2] = fmaf(a[4], b[4], fours[0]);
  sum[3] = fmaf(a[1], b[1], fours[1]);
  sum[4] = fmaf(a[6], b[6], fours[1]);
  sum[5] = fmaf(a[3], b[3], fours[2]);
  sum[6] = fours[2] + (last ? 0 : after);
  sum[7] = fmaf(a[5], b[5], pairs[3] + (last ? 0 : pair_after));
}

__device__ inline void roots_of_five(float (&root)[kLaneChannels], const DeviceLrn<float>& lrn,
                                     const float (&x)[kLaneChannels], bool first, bool last) {
  sums_of_five(root, x, x, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) root[i] = inverse_root(lrn.k + lrn.mean * root[i]);
}

__device__ inline void values_of_five(float (&y)[kLaneChannels], const DeviceLrn<float>& lrn,
                                      const float (&x)[kLaneChannels], bool first, bool last) {
  float root[kLaneChannels];
  roots_of_five(root, lrn, x, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) y[i] = x[i] * inverse_three_quarters(root[i]);
}

__device__ inline void gradients_of_five(float (&dx)[kLaneChannels], const DeviceLrn<float>& lrn,
                                         const float (&x)[kLaneChannels], const float (&dy)[kLaneChannels], bool first,
                                         bool last) {
  float root[kLaneChannels], scaled[kLaneChannels], rest[kLaneChannels], sum[kLaneChannels];
  roots_of_five(root, lrn, x, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    scaled[i] = dy[i] * inverse_three_quarters(root[i]);
    rest[i] = x[i] * (root[i] * root[i]);
  }
  sums_of_five(sum, scaled, rest, first, last);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) dx[i] = scaled[i] - lrn.factor * x[i] * sum[i];
}

}  // namespace alexnet_ext
