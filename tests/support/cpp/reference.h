// The formulas as plain loops over indices, written independently of the kernels.
#pragma once

#include "harness.h"
#include "local_response_norm/local_response_norm.h"
#include "relu_max_pool2d/relu_max_pool2d.h"

namespace alexnet_ext::test {

// ---- local response normalization of one pixel's channels, in the type A

// s_c = k + alpha/n * sum of x_j^2 for j in [c - n/2, c + (n-1)/2]
template <class A>
std::vector<A> lrn_scales(const Lrn& lrn, const std::vector<A>& x) {
  const int64_t channels = x.size();
  std::vector<A> s(channels);
  for (int64_t c = 0; c < channels; ++c) {
    A sum = 0;
    for (int64_t j = c - lrn.size / 2; j <= c + (lrn.size - 1) / 2; ++j)
      if (j >= 0 && j < channels) sum += x[j] * x[j];
    s[c] = A(lrn.k) + A(lrn.alpha / lrn.size) * sum;
  }
  return s;
}

template <class A>
std::vector<A> lrn(const Lrn& lrn, const std::vector<A>& x) {
  const std::vector<A> s = lrn_scales(lrn, x);
  std::vector<A> y(x.size());
  for (size_t c = 0; c < x.size(); ++c) y[c] = x[c] / std::pow(s[c], A(lrn.beta));
  return y;
}

// dx. `magnitude` is set to the sum of the absolute values of its terms.
template <class A>
std::vector<A> lrn_gradient(const Lrn& lrn, const std::vector<A>& x, const std::vector<A>& dy,
                            std::vector<A>* magnitude) {
  const int64_t channels = x.size();
  const std::vector<A> s = lrn_scales(lrn, x);
  std::vector<A> dx(channels);
  magnitude->resize(channels);
  for (int64_t i = 0; i < channels; ++i) {
    A sum = 0, size = 0;
    for (int64_t j = i - (lrn.size - 1) / 2; j <= i + lrn.size / 2; ++j) {
      if (j < 0 || j >= channels) continue;
      const A term = dy[j] / std::pow(s[j], A(lrn.beta)) * x[j] / s[j];
      sum += term;
      size += std::fabs(term);
    }
    const A own = dy[i] / std::pow(s[i], A(lrn.beta)), factor = A(2 * lrn.alpha * lrn.beta / lrn.size);
    dx[i] = lrn.beta == 0 ? own : own - factor * x[i] * sum;
    (*magnitude)[i] = std::fabs(own) + (lrn.beta == 0 ? 0 : std::fabs(factor * x[i]) * size);
  }
  return dx;
}

// ---- images

inline int64_t count(const Images& s) { return s.batch * s.channels * s.height * s.width; }

inline int64_t at(const Images& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return s.channels_last ? ((n * s.height + h) * s.width + w) * s.channels + c
                         : ((n * s.channels + c) * s.height + h) * s.width + w;
}

inline std::string text(const Images& s) {
  return std::to_string(s.batch) + "x" + std::to_string(s.channels) + "x" + std::to_string(s.height) + "x" +
         std::to_string(s.width) + (s.channels_last ? " NHWC" : " NCHW");
}

// The size of a pooled side, by the rule of torch.nn.MaxPool2d: the windows that fit. With `ceil` there is one more if
// it starts inside the image or its left padding.
inline int64_t pooled_side(int64_t side, const Pooling& p, int i, bool ceil) {
  const int64_t last = side + 2 * p.padding[i] - p.dilation[i] * (p.kernel[i] - 1) - 1;
  int64_t windows = 0;
  for (int64_t start = 0; start <= last; start += p.stride[i]) ++windows;
  const int64_t next = windows * p.stride[i];
  return windows + (ceil && next - last < p.stride[i] && next < side + p.padding[i]);
}

// Calls f(input row, input column, tap) for the taps of an output that are inside the image, in row-major order.
template <class F>
void for_taps(const Images& in, const Pooling& p, int64_t oh, int64_t ow, F&& f) {
  for (int64_t r = 0; r < p.kernel[0]; ++r)
    for (int64_t q = 0; q < p.kernel[1]; ++q) {
      const int64_t h = oh * p.stride[0] - p.padding[0] + r * p.dilation[0];
      const int64_t w = ow * p.stride[1] - p.padding[1] + q * p.dilation[1];
      if (h >= 0 && h < in.height && w >= 0 && w < in.width) f(h, w, r * p.kernel[1] + q);
    }
}

// Calls f(n, c, h, w) for all elements.
template <class F>
void for_elements(const Images& s, F&& f) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; ++w) f(n, c, h, w);
}

// The gradient of each input element, in double: the sum over the windows that it won.
template <class T>
std::vector<double> unpool(const Images& in, const Images& out, const Pooling& p, const Array<T>& dy,
                           const Array<uint8_t>& winners) {
  std::vector<double> dx(count(in), 0.0);
  for_elements(out, [&](int64_t n, int64_t c, int64_t oh, int64_t ow) {
    const int64_t o = at(out, n, c, oh, ow);
    for_taps(in, p, oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
      if (winners[o] == tap) dx[at(in, n, c, h, w)] += value(dy[o]);
    });
  });
  return dx;
}

}  // namespace alexnet_ext::test
