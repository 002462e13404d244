// Compares relu_max_pool2d_lrn on the CPU with plain loops: bias, ReLU and pooling to the bit, then LRN, and the
// gradient.
#include "blocks.h"
#include "relu_max_pool2d_lrn/relu_max_pool2d_lrn.h"

namespace alexnet_ext::test {
namespace {

template <class T>
struct Results {
  Array<T> y, pooled;
  Array<uint8_t> winners;
};

template <class T>
struct Gradients {
  Array<T> dx;
  Array<Acc<T>> bias_sums;
};

template <class T>
Results<T> forward(Isa isa, const LrnPoolBlock& p, const Array<T>& x, const Array<T>* bias, Split split) {
  Results<T> out{Array<T>(count(p.out)), Array<T>(count(p.out)), Array<uint8_t>(count(p.out))};
  with_isa(isa, [&](auto i) {
    run_units(split, band_count(p.out), [&](int64_t begin, int64_t end) {
      relu_max_pool2d_lrn_cpu<i.value>(p, x.data(), bias ? bias->data() : nullptr, out.y.data(), out.pooled.data(),
                                       out.winners.data(), begin, end);
    });
  });
  return out;
}

template <class T>
Gradients<T> backward(Isa isa, const LrnPoolBlock& p, const Array<T>& dy, const Results<T>& saved, Split split) {
  Gradients<T> out{Array<T>(count(p.in)), Array<Acc<T>>(band_count(p.in) * p.in.channels)};
  with_isa(isa, [&](auto i) {
    run_units(split, band_count(p.in), [&](int64_t begin, int64_t end) {
      relu_max_pool2d_lrn_backward_cpu<i.value>(p, dy.data(), saved.pooled.data(), saved.winners.data(), out.dx.data(),
                                                out.bias_sums.data(), begin, end);
    });
  });
  return out;
}

template <class T>
void check(Isa isa, const LrnPoolBlock& p, const Array<T>& x, const Array<T>* bias, const Array<T>& dy) {
  const double rounding = 16 + 2 * p.lrn.size + 8 * std::fabs(p.lrn.beta);
  const Results<T> got = forward(isa, p, x, bias, Split::whole);
  const Gradients<T> gradients = backward(isa, p, dy, got, Split::whole);

  std::vector<double> exact_dpooled(count(p.out)), size(count(p.out));
  for (int64_t n = 0; n < p.out.batch; ++n)
    for (int64_t oh = 0; oh < p.out.height; ++oh)
      for (int64_t ow = 0; ow < p.out.width; ++ow) {
        std::vector<double> best(p.out.channels), kept(p.out.channels), g(p.out.channels), magnitude;
        for (int64_t c = 0; c < p.out.channels; ++c) {
          Acc<T> greatest = 0;
          int winner = kNoWinner;
          for_taps(p.in, p.pool, oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
            const Acc<T> v = biased(x, bias, at(p.in, n, c, h, w), c);
            if (v > greatest || v != v) greatest = v, winner = tap;
          });
          const int64_t o = at(p.out, n, c, oh, ow);
          best[c] = greatest;
          expect_byte("winners", o, got.winners[o], winner);
          expect_equal("pooled", o, got.pooled[o], value(rounded<T>(greatest)));
          kept[c] = value(got.pooled[o]);
          g[c] = value(dy[o]);
        }
        const std::vector<double> y = lrn(p.lrn, best), dpooled = lrn_gradient(p.lrn, kept, g, &magnitude);
        for (int64_t c = 0; c < p.out.channels; ++c) {
          const int64_t o = at(p.out, n, c, oh, ow);
          expect_near("y", o, got.y[o], y[c], std::fabs(y[c]), rounding);
          exact_dpooled[o] = dpooled[c];
          size[o] = magnitude[c];
        }
      }

  std::vector<double> dx(count(p.in), 0.0), dx_size(count(p.in), 0.0);
  for_elements(p.out, [&](int64_t n, int64_t c, int64_t oh, int64_t ow) {
    const int64_t o = at(p.out, n, c, oh, ow);
    for_taps(p.in, p.pool, oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
      if (got.winners[o] != tap) return;
      dx[at(p.in, n, c, h, w)] += exact_dpooled[o];
      dx_size[at(p.in, n, c, h, w)] += size[o];
    });
  });
  bool finite = true;
  for (int64_t i = 0; i < count(p.in); ++i) {
    finite = finite && std::isfinite(dx[i]);
    expect_near("dx", i, gradients.dx[i], dx[i], dx_size[i], rounding);
  }
  if (finite) compare_bias_sums<T>(p, gradients.bias_sums, dx, dx_size, rounding + p.in.height * p.in.width);

  for (Split split : {Split::units, Split::threads}) {
    const Results<T> again = forward(isa, p, x, bias, split);
    const Gradients<T> again_dx = backward(isa, p, dy, got, split);
    expect(got.y.same_bits(again.y) && got.pooled.same_bits(again.pooled) && got.winners.same_bits(again.winners) &&
               gradients.dx.same_bits(again_dx.dx) && gradients.bias_sums.same_bits(again_dx.bias_sums),
           "the split of the units changes a result");
  }
}

template <class T>
void all_cases(Isa isa) {
  Random random(4);
  for_blocks<T>([&](const LrnPoolBlock& p, const std::string& name) {
    const Array<T> bias = random_array<T>(random, p.in.channels), dy = random_array<T>(random, count(p.out));
    Array<T> x = random_array<T>(random, count(p.in));
    report().where = std::string(isa_name(isa)) + " " + name;
    check<T>(isa, p, x, &bias, dy);
    report().where += " no bias";
    check<T>(isa, p, x, nullptr, dy);
    report().where += " with NaN";
    for (int64_t i = 0; i < x.size(); i += 11) x[i] = rounded<T>(NAN);
    check<T>(isa, p, x, nullptr, dy);
    report().where += " all negative";
    for (int64_t i = 0; i < x.size(); ++i) x[i] = rounded<T>(-1 - i % 3);
    check<T>(isa, p, x, nullptr, dy);
  });
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas()) for_types([&](auto type) { all_cases<typename decltype(type)::type>(isa); });
  return finish("relu_max_pool2d_lrn");
}
