// Compares relu_lrn_max_pool2d on the CPU with plain loops: bias, ReLU, LRN and pooling, and the gradient.
#include "blocks.h"
#include "relu_lrn_max_pool2d/relu_lrn_max_pool2d.h"

namespace alexnet_ext::test {
namespace {

template <class T>
struct Results {
  Array<T> y;
  Array<uint8_t> winners;
};

template <class T>
struct Gradients {
  Array<T> dx;
  Array<Acc<T>> bias_sums;
};

template <class T>
Results<T> forward(Isa isa, const LrnPoolBlock& p, const Array<T>& x, const Array<T>* bias, Split split) {
  Results<T> out{Array<T>(count(p.out)), Array<uint8_t>(count(p.out))};
  with_isa(isa, [&](auto i) {
    run_units(split, band_count(p.out), [&](int64_t begin, int64_t end) {
      relu_lrn_max_pool2d_cpu<i.value>(p, x.data(), bias ? bias->data() : nullptr, out.y.data(), out.winners.data(),
                                       begin, end);
    });
  });
  return out;
}

template <class T>
Gradients<T> backward(Isa isa, const LrnPoolBlock& p, const Array<T>& dy, const Array<T>& x, const Array<T>* bias,
                      const Array<uint8_t>& winners, Split split) {
  Gradients<T> out{Array<T>(count(p.in)), Array<Acc<T>>(band_count(p.in) * p.in.channels)};
  with_isa(isa, [&](auto i) {
    run_units(split, band_count(p.in), [&](int64_t begin, int64_t end) {
      relu_lrn_max_pool2d_backward_cpu<i.value>(p, dy.data(), x.data(), bias ? bias->data() : nullptr, winners.data(),
                                                out.dx.data(), out.bias_sums.data(), begin, end);
    });
  });
  return out;
}

// Calls f(place) for every pixel of the input; place(c) is the index of channel c.
template <class F>
void for_pixels(const Images& s, F&& f) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t h = 0; h < s.height; ++h)
      for (int64_t w = 0; w < s.width; ++w) f([=, &s](int64_t c) { return at(s, n, c, h, w); });
}

template <class T>
void check(Isa isa, const LrnPoolBlock& p, const Array<T>& x, const Array<T>* bias, const Array<T>& dy) {
  const double rounding = 16 + 2 * p.lrn.size + 8 * std::fabs(p.lrn.beta);
  std::vector<double> activation(count(p.in)), normalized(count(p.in));
  for_pixels(p.in, [&](auto place) {
    std::vector<double> a(p.in.channels);
    for (int64_t c = 0; c < p.in.channels; ++c) {
      const double v = biased(x, bias, place(c), c);
      a[c] = activation[place(c)] = v <= 0 ? 0 : v;
    }
    const std::vector<double> y = lrn(p.lrn, a);
    for (int64_t c = 0; c < p.in.channels; ++c) normalized[place(c)] = y[c];
  });

  const Results<T> got = forward(isa, p, x, bias, Split::whole);
  for_elements(p.out, [&](int64_t n, int64_t c, int64_t oh, int64_t ow) {
    // The maximum is known up to rounding, so any tap close enough may win. Of exactly equal values (the zeros of ReLU)
    // the first must win, and of NaNs the last.
    double best = -INFINITY, chosen = -INFINITY, first_best = -1, last_nan = -1;
    const int64_t o = at(p.out, n, c, oh, ow);
    for_taps(p.in, p.pool, oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
      const double v = normalized[at(p.in, n, c, h, w)];
      if (v != v) last_nan = tap;
      if (v > best) best = v, first_best = tap;
      if (tap == got.winners[o]) chosen = v;
    });
    if (last_nan >= 0) {
      expect_equal("y", o, got.y[o], NAN);
      expect_byte("winners", o, got.winners[o], last_nan);
      return;
    }
    const double allowed = 2 * rounding * kEpsilon<T> * std::fabs(best);
    expect_near("y", o, got.y[o], best, std::fabs(best), rounding);
    if (best == 0) expect_byte("winners", o, got.winners[o], first_best);
    expect_value(std::fabs(chosen - best) <= allowed, "the winner's value", o, chosen, best, allowed);
  });

  const Gradients<T> gradients = backward(isa, p, dy, x, bias, got.winners, Split::whole);
  const std::vector<double> arriving = unpool(p.in, p.out, p.pool, dy, got.winners);
  std::vector<double> dx(count(p.in)), size(count(p.in));
  for_pixels(p.in, [&](auto place) {
    std::vector<double> a(p.in.channels), g(p.in.channels), magnitude;
    for (int64_t c = 0; c < p.in.channels; ++c) a[c] = activation[place(c)], g[c] = arriving[place(c)];
    const std::vector<double> gradient = lrn_gradient(p.lrn, a, g, &magnitude);
    for (int64_t c = 0; c < p.in.channels; ++c) {
      const int64_t i = place(c);
      dx[i] = a[c] <= 0 ? 0 : gradient[c], size[i] = a[c] <= 0 ? 0 : magnitude[c];
      expect_near("dx", i, gradients.dx[i], dx[i], size[i], rounding);
    }
  });
  bool finite = true;
  for (double v : dx) finite = finite && std::isfinite(v);
  if (finite) compare_bias_sums<T>(p, gradients.bias_sums, dx, size, rounding + p.in.height * p.in.width);

  for (Split split : {Split::units, Split::threads}) {
    const Results<T> again = forward(isa, p, x, bias, split);
    const Gradients<T> again_dx = backward(isa, p, dy, x, bias, got.winners, split);
    expect(got.y.same_bits(again.y) && got.winners.same_bits(again.winners) && gradients.dx.same_bits(again_dx.dx) &&
               gradients.bias_sums.same_bits(again_dx.bias_sums),
           "the split of the units changes a result");
  }
}

template <class T>
void all_cases(Isa isa) {
  Random random(3);
  for_blocks<T>([&](const LrnPoolBlock& p, const std::string& name) {
    const Array<T> bias = random_array<T>(random, p.in.channels), dy = random_array<T>(random, count(p.out));
    Array<T> x = random_array<T>(random, count(p.in));
    report().where = std::string(isa_name(isa)) + " " + name;
    check<T>(isa, p, x, &bias, dy);
    report().where += " no bias";
    check<T>(isa, p, x, nullptr, dy);
    report().where += " all negative";
    for (int64_t i = 0; i < x.size(); ++i) x[i] = rounded<T>(-1 - std::fabs(value(x[i])));
    check<T>(isa, p, x, nullptr, dy);
    report().where += " with NaN";
    for (int64_t i = 0; i < x.size(); i += 11) x[i] = rounded<T>(NAN);
    check<T>(isa, p, x, nullptr, dy);
  });
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas()) for_types([&](auto type) { all_cases<typename decltype(type)::type>(isa); });
  return finish("relu_lrn_max_pool2d");
}
