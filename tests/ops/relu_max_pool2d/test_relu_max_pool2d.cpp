// relu_max_pool2d on the CPU, to the bit: ties, NaN, padding, every stride and dilation, bands of rows, splits of
// units.
#include "harness.h"
#include "reference.h"
#include "relu_max_pool2d/relu_max_pool2d.h"

namespace alexnet_ext::test {
namespace {

template <class T>
struct Results {
  Array<T> y;
  Array<uint8_t> winners;
  Array<T> dx;
};

template <class T>
Results<T> run(Isa isa, const ReluMaxPool2d& p, const Array<T>& x, const Array<T>& dy, Split split) {
  Results<T> out{Array<T>(count(p.out)), Array<uint8_t>(count(p.out)), Array<T>(count(p.in))};
  with_isa(isa, [&](auto i) {
    run_units(split, relu_max_pool2d_units(p.out), [&](int64_t begin, int64_t end) {
      relu_max_pool2d_cpu<i.value>(p, x.data(), out.y.data(), out.winners.data(), begin, end);
    });
    run_units(split, relu_max_pool2d_units(p.in), [&](int64_t begin, int64_t end) {
      relu_max_pool2d_backward_cpu<i.value>(p, dy.data(), out.winners.data(), out.dx.data(), begin, end);
    });
  });
  return out;
}

// The winner is the last NaN, or else the first of the greatest values above 0. Without a winner y is 0, and if the
// first value of the window is a zero, y has its sign. In an NCHW window that begins to the left of the image, the
// padding hides that sign.
template <class T>
void compare(const ReluMaxPool2d& p, const Array<T>& x, const Array<T>& dy, const Results<T>& got) {
  for_elements(p.out, [&](int64_t n, int64_t c, int64_t oh, int64_t ow) {
    double best = 0;
    bool first = true;
    int winner = kNoWinner;
    for_taps(p.in, p.pool, oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
      const double v = value(x[at(p.in, n, c, h, w)]);
      if (first && v == 0) best = v;
      first = false;
      if (v > best || v != v) best = v, winner = tap;
    });
    const int64_t o = at(p.out, n, c, oh, ow);
    expect_equal("y", o, got.y[o], best);
    const bool sign_kept = p.in.channels_last || ow * p.pool.stride[1] >= p.pool.padding[1];
    if (best == 0 && sign_kept) expect_byte("sign of y", o, std::signbit(value(got.y[o])), std::signbit(best));
    expect_byte("winners", o, got.winners[o], winner);
  });
  // dy has small integers, so that sums are exact in every type.
  const std::vector<double> dx = unpool(p.in, p.out, p.pool, dy, got.winners);
  for (int64_t i = 0; i < count(p.in); ++i) expect_equal("dx", i, got.dx[i], dx[i]);
}

template <class T>
void check(Isa isa, const Images& in, const Pooling& pool, bool ceil) {
  ReluMaxPool2d p{kDType<T>, in, in, pool};
  p.out.height = pooled_side(in.height, pool, 0, ceil);
  p.out.width = pooled_side(in.width, pool, 1, ceil);
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " " + text(in) + " to " + text(p.out) +
                   " kernel " + std::to_string(pool.kernel[0]) + "," + std::to_string(pool.kernel[1]) + " stride " +
                   std::to_string(pool.stride[0]) + "," + std::to_string(pool.stride[1]) + " padding " +
                   std::to_string(pool.padding[0]) + "," + std::to_string(pool.padding[1]) + " dilation " +
                   std::to_string(pool.dilation[0]) + "," + std::to_string(pool.dilation[1]);
  if (p.out.height < 1 || p.out.width < 1) return expect(false, "the test's window does not fit");
  Random random(in.width + 7 * in.channels);
  // First small integers, which make ties; then real numbers; then real numbers with NaN and inf.
  for (int mode = 0; mode < 3; ++mode) {
    Array<T> x(count(in)), dy(count(p.out)), x_before(count(in));
    for (int64_t i = 0; i < x.size(); ++i) {
      double v = mode == 1 ? normal(random) : integer(random, -4, 3);
      if (mode == 2 && integer(random, 0, 5) == 0)
        v = integer(random, 0, 2) ? NAN : integer(random, 0, 1) ? INFINITY : -INFINITY;
      if (v == 0 && integer(random, 0, 1)) v = -0.0;
      x[i] = x_before[i] = rounded<T>(v);
    }
    for (int64_t i = 0; i < dy.size(); ++i) dy[i] = rounded<T>(integer(random, -3, 3));
    const Results<T> whole = run(isa, p, x, dy, Split::whole);
    compare(p, x, dy, whole);
    for (Split split : {Split::units, Split::threads}) {
      const Results<T> again = run(isa, p, x, dy, split);
      expect(whole.y.same_bits(again.y) && whole.winners.same_bits(again.winners) && whole.dx.same_bits(again.dx),
             "the split of the units changes a result");
    }
    expect(x.same_bits(x_before), "the input was written to");
  }
}

struct Case {
  Images in;
  Pooling pool;
  bool ceil = false;
};

template <class T>
void all_cases(Isa isa) {
  const Pooling three_by_two{{3, 3}, {2, 2}, {0, 0}, {1, 1}};
  std::vector<Case> cases;
  for (int64_t width : {3, 4, 15, 16, 17, 31, 33, 34, 35, 67}) cases.push_back({{1, 2, 5, width, false}, three_by_two});
  for (int64_t channels : {1, 7, 8, 9, 16, 31, 33, 65}) cases.push_back({{2, channels, 5, 7, false}, three_by_two});
  cases.push_back({{1, 1, 1, 1, false}, {{1, 1}, {1, 1}, {0, 0}, {1, 1}}});
  // Images with more rows than a band, and enough images that a band is a whole image.
  cases.push_back({{2, 3, 27, 9, false}, three_by_two});
  cases.push_back({{16, 2, 19, 5, false}, three_by_two});
  cases.push_back({{1, 3, 13, 9, false}, three_by_two, true});
  cases.push_back({{2, 3, 6, 8, false}, three_by_two, true});
  cases.push_back({{1, 3, 9, 7, false}, {{3, 3}, {2, 2}, {1, 1}, {1, 1}}, true});
  cases.push_back({{1, 8, 6, 9, false}, {{3, 3}, {1, 1}, {1, 1}, {1, 1}}});
  cases.push_back({{1, 5, 8, 6, false}, {{2, 2}, {2, 2}, {0, 0}, {1, 1}}});
  cases.push_back({{1, 3, 9, 11, false}, {{3, 2}, {1, 2}, {1, 0}, {1, 1}}});
  cases.push_back({{1, 3, 11, 9, false}, {{2, 3}, {2, 1}, {0, 1}, {3, 2}}});
  cases.push_back({{1, 3, 12, 10, false}, {{5, 5}, {3, 3}, {2, 2}, {1, 1}}});
  cases.push_back({{1, 3, 9, 10, false}, {{2, 2}, {4, 4}, {0, 0}, {1, 1}}});
  cases.push_back({{1, 2, 9, 23, false}, {{1, 3}, {1, 5}, {0, 1}, {1, 4}}});
  cases.push_back({{1, 2, 16, 17, false}, {{15, 15}, {1, 1}, {7, 7}, {1, 1}}});
  for (Case c : cases)
    for (bool channels_last : {false, true}) {
      c.in.channels_last = channels_last;
      check<T>(isa, c.in, c.pool, c.ceil);
    }
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas()) for_types([&](auto type) { all_cases<typename decltype(type)::type>(isa); });
  return finish("relu_max_pool2d");
}
