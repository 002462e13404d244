// LRN of a tile of pixels in scratch memory, forward and backward: the CPU core of every op that normalizes.
//
// A tile is [channels][pixels] or, channels-last, [pixels][channels]. In both, the window of an element is its
// neighbours at multiples of a fixed step in one flat array. Zeros before and after that array let one loop serve both
// layouts without tests at the ends. Each window sum is computed anew: a running sum would carry an inf, or the
// rounding of a large value, into all channels after it.
#pragma once

#include "../common/cpu_vector.h"
#include "local_response_norm.h"

namespace alexnet_ext::ALEXNET_ISA {

// s^beta. beta = 3/4 and 1/2 take square roots, 1 takes s itself. Others take pow, which for a negative s gives
// PyTorch's values.
struct PowerThreeQuarters {
  template <class A>
  Vec<A> operator()(Vec<A> s) const {
    Vec<A> root = sqrt<A>(s);
    return root * sqrt<A>(root);
  }
};
struct PowerHalf {
  template <class A>
  Vec<A> operator()(Vec<A> s) const {
    return sqrt<A>(s);
  }
};
struct PowerOne {
  template <class A>
  Vec<A> operator()(Vec<A> s) const {
    return s;
  }
};
struct PowerAny {
  double beta;
  template <class A>
  Vec<A> operator()(Vec<A> s) const {
    for (int i = 0; i < kLanes<A>; ++i) s[i] = std::pow(s[i], static_cast<A>(beta));
    return s;
  }
};

template <class F>
inline void with_power(double beta, F&& f) {
  if (beta == 0.75) return f(PowerThreeQuarters{});
  if (beta == 0.5) return f(PowerHalf{});
  if (beta == 1.0) return f(PowerOne{});
  return f(PowerAny{beta});
}

template <class A>
class LrnRows {
 public:
  LrnRows(const Lrn& lrn, int64_t channels, int64_t max_pixels, bool channels_last)
      : lrn_(lrn),
        channels_(channels),
        channels_last_(channels_last),
        before_(lrn.size / 2 < channels ? lrn.size / 2 : channels),
        after_((lrn.size - 1) / 2 < channels ? (lrn.size - 1) / 2 : channels),
        max_step_(channels_last ? 1 : max_pixels),
        squares_((channels + before_ + after_) * max_step_),
        terms_((channels + before_ + after_) * max_step_),
        scaled_(channels * max_step_) {}

  // y must not overlap x. Both must have a vector of slack.
  void forward(const A* x, A* y, int64_t pixels) {
    with_power(lrn_.beta, [&](auto power) {
      for_groups(pixels, [&](int64_t at, int64_t span, int64_t step) { normalize(x + at, y + at, span, step, power); });
    });
  }

  void backward(const A* x, const A* dy, A* dx, int64_t pixels) {
    with_power(lrn_.beta, [&](auto power) {
      for_groups(pixels, [&](int64_t at, int64_t span, int64_t step) {
        differentiate(x + at, dy + at, dx + at, span, step, power);
      });
    });
  }

 private:
  // A group is a run of elements with one flat array of windows: the whole tile, or the channels of one pixel.
  template <class F>
  void for_groups(int64_t pixels, F&& f) {
    if (!channels_last_) return f(0, channels_ * pixels, pixels);
    for (int64_t p = 0; p < pixels; ++p) f(p * channels_, channels_, 1);
  }

  // The sum of the 1 + before + after elements from `first` on, which are `step` apart.
  Vec<A> window(const A* first, int64_t step) const {
    Vec<A> sum = load(first);
    for (int64_t j = 1; j <= before_ + after_; ++j) sum += load(first + j * step);
    return sum;
  }

  // Stores the squares of x, followed by zeros. Returns the start of the window of element 0.
  const A* lay_squares(const A* x, int64_t span, int64_t step) {
    A* data = squares_ + before_ * max_step_;
    for (int64_t f = 0; f < span; f += kLanes<A>) {
      Vec<A> v = load(x + f);
      store(data + f, Vec<A>(v * v));
    }
    for (int64_t f = span; f < span + after_ * step; ++f) data[f] = 0;
    return data - before_ * step;
  }

  template <class Power>
  void normalize(const A* x, A* y, int64_t span, int64_t step, Power power) {
    const A* windows = lay_squares(x, span, step);
    const A mean = static_cast<A>(lrn_.alpha / static_cast<double>(lrn_.size)), k = static_cast<A>(lrn_.k);
    for (int64_t f = 0; f < span; f += kLanes<A>) {
      Vec<A> s = k + mean * window(windows + f, step);
      store(y + f, Vec<A>(load(x + f) / power.template operator()<A>(s)));
    }
  }

  template <class Power>
  void differentiate(const A* x, const A* dy, A* dx, int64_t span, int64_t step, Power power) {
    const A* windows = lay_squares(x, span, step);
    const A mean = static_cast<A>(lrn_.alpha / static_cast<double>(lrn_.size)), k = static_cast<A>(lrn_.k);
    A* terms = terms_ + after_ * max_step_;
    for (int64_t f = 0; f < span; f += kLanes<A>) {
      Vec<A> s = k + mean * window(windows + f, step);
      Vec<A> scaled = load(dy + f) / power.template operator()<A>(s);
      store(scaled_ + f, scaled);
      // dy * s^-beta comes first: if s overflowed it is 0, while x * s^-(beta+1) could be inf * 0.
      store(terms + f, Vec<A>(scaled * load(x + f) / s));
    }
    for (int64_t f = span; f < span + before_ * step; ++f) terms[f] = 0;
    // pow(s, 0) is constant for every s, so no gradient flows through it, not even 0 * inf.
    if (lrn_.beta == 0) return std::memcpy(dx, scaled_, span * sizeof(A)), void();
    const A factor = static_cast<A>(2 * lrn_.alpha * lrn_.beta / static_cast<double>(lrn_.size));
    for (int64_t f = 0; f < span; f += kLanes<A>) {
      Vec<A> sum = window(terms + f - after_ * step, step);
      store(dx + f, Vec<A>(load(scaled_ + f) - factor * load(x + f) * sum));
    }
  }

  Lrn lrn_;
  int64_t channels_;
  bool channels_last_;
  int64_t before_, after_, max_step_;
  Buffer<A> squares_, terms_, scaled_;
};

}  // namespace alexnet_ext::ALEXNET_ISA
