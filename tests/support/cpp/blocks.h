// Shared by the tests of both fused blocks: cases, random tensors, the biased input, and the comparison of bias sums.
#pragma once

#include "harness.h"
#include "reference.h"
#include "relu_lrn_max_pool2d/relu_lrn_max_pool2d.h"

namespace alexnet_ext::test {

// Calls f(problem, name) for every case in both layouts.
template <class T, class F>
void for_blocks(F&& f) {
  struct Case {
    int64_t batch, channels, height, width;
    int64_t kernel[2], stride[2];
    Lrn lrn;
  };
  constexpr Lrn kLrn{5, 1.5, 0.75, 2};
  std::vector<Case> cases;
  for (int64_t width : {3, 4, 15, 17, 33, 35}) cases.push_back({1, 3, 5, width, {3, 3}, {2, 2}, kLrn});
  for (int64_t channels : {1, 7, 8, 17, 33}) cases.push_back({2, channels, 5, 7, {3, 3}, {2, 2}, kLrn});
  for (int64_t size : {1, 2, 4, 15}) cases.push_back({1, 6, 5, 7, {3, 3}, {2, 2}, {size, 1.5, 0.75, 2}});
  for (double beta : {0.0, 0.5, 1.0, 0.3}) cases.push_back({1, 7, 5, 7, {3, 3}, {2, 2}, {4, 1.5, beta, 2}});
  cases.push_back({1, 1, 1, 1, {1, 1}, {1, 1}, kLrn});
  // Images with more rows than a band, and enough images that a band is a whole image.
  cases.push_back({2, 3, 27, 5, {3, 3}, {2, 2}, kLrn});
  cases.push_back({16, 2, 19, 3, {3, 3}, {2, 2}, kLrn});
  cases.push_back({1, 5, 6, 9, {2, 3}, {1, 2}, kLrn});
  cases.push_back({1, 5, 9, 8, {2, 2}, {3, 3}, kLrn});
  cases.push_back({1, 4, 7, 6, {3, 3}, {1, 1}, kLrn});
  for (const Case& c : cases)
    for (bool channels_last : {false, true}) {
      LrnPoolBlock p{kDType<T>, {c.batch, c.channels, c.height, c.width, channels_last}, {}, {}, c.lrn};
      for (int i = 0; i < 2; ++i) {
        p.pool.kernel[i] = c.kernel[i], p.pool.stride[i] = c.stride[i];
        p.pool.padding[i] = 0, p.pool.dilation[i] = 1;
      }
      p.out = p.in;
      p.out.height = pooled_side(c.height, p.pool, 0, false);
      p.out.width = pooled_side(c.width, p.pool, 1, false);
      f(p, std::string(dtype_name<T>()) + " " + text(p.in) + " to " + text(p.out) + " n=" + std::to_string(c.lrn.size) +
               " beta=" + text(c.lrn.beta));
    }
}

// x + bias, rounded to the kernel's arithmetic type.
template <class T>
Acc<T> biased(const Array<T>& x, const Array<T>* bias, int64_t i, int64_t c) {
  const Acc<T> v = value(x[i]);
  return bias == nullptr ? v : static_cast<Acc<T>>(v + static_cast<Acc<T>>(value((*bias)[c])));
}

template <class T>
Array<T> random_array(Random& random, int64_t size) {
  Array<T> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = rounded<T>(normal(random));
  return values;
}

// Compares the sums over all units with the sums of the exact dx. `magnitude` has one value for each dx.
template <class T>
void compare_bias_sums(const LrnPoolBlock& p, const Array<Acc<T>>& sums, const std::vector<double>& dx,
                       const std::vector<double>& magnitude, double rounding) {
  for (int64_t c = 0; c < p.in.channels; ++c) {
    double got = 0, exact = 0, size = 0;
    for (int64_t unit = 0; unit < band_count(p.in); ++unit) got += sums[unit * p.in.channels + c];
    for_elements(p.in, [&](int64_t n, int64_t channel, int64_t h, int64_t w) {
      const int64_t i = at(p.in, n, channel, h, w);
      if (channel == c) exact += dx[i], size += magnitude[i];
    });
    const double allowed = rounding * kEpsilon<T> * size + 1e-45;
    expect_value(std::fabs(got - exact) <= allowed, "bias gradient", c, got, exact, allowed);
  }
}

}  // namespace alexnet_ext::test
