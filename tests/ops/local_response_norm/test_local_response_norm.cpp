// Compares local_response_norm on the CPU with plain loops: types, strides, windows, betas, special values, splits of
// units.
#include "harness.h"
#include "reference.h"

namespace alexnet_ext::test {
namespace {

struct Shape {
  int64_t batch, channels, pixels;
};

enum class Order { nchw, nhwc, channels_first, batch_last };

LocalResponseNorm problem(DType dtype, const Shape& s, const Lrn& lrn, Order order) {
  LocalResponseNorm p{dtype, lrn, s.batch, s.channels, s.pixels, 0, 0, 0};
  switch (order) {
    case Order::nchw:
      p.batch_stride = s.channels * s.pixels, p.channel_stride = s.pixels, p.pixel_stride = 1;
      break;
    case Order::nhwc:
      p.batch_stride = s.channels * s.pixels, p.channel_stride = 1, p.pixel_stride = s.channels;
      break;
    case Order::channels_first:
      p.batch_stride = s.pixels, p.channel_stride = s.batch * s.pixels, p.pixel_stride = 1;
      break;
    case Order::batch_last:
      p.batch_stride = 1, p.channel_stride = s.batch, p.pixel_stride = s.channels * s.batch;
      break;
  }
  return p;
}

template <class T>
struct Tensors {
  Array<T> x, dy;
};

template <class T>
struct Results {
  Array<T> y, dx;
};

template <class T>
Results<T> run(Isa isa, const LocalResponseNorm& p, const Tensors<T>& in, Split split) {
  Results<T> out{Array<T>(in.x.size()), Array<T>(in.x.size())};
  with_isa(isa, [&](auto i) {
    run_units(split, local_response_norm_units(p), [&](int64_t begin, int64_t end) {
      local_response_norm_cpu<i.value>(p, in.x.data(), out.y.data(), begin, end);
    });
    run_units(split, local_response_norm_units(p), [&](int64_t begin, int64_t end) {
      local_response_norm_backward_cpu<i.value>(p, in.dy.data(), in.x.data(), out.dx.data(), begin, end);
    });
  });
  return out;
}

// A is the type of the reference: double for precision, or the kernel's arithmetic type to overflow as it does.
template <class A, class T>
void compare(const LocalResponseNorm& p, const Tensors<T>& in, const Results<T>& got) {
  const double rounding = 16 + 2 * p.lrn.size + 8 * std::fabs(p.lrn.beta);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t i = 0; i < p.pixels; ++i) {
      std::vector<A> x(p.channels), dy(p.channels), magnitude;
      auto place = [&](int64_t c) { return n * p.batch_stride + c * p.channel_stride + i * p.pixel_stride; };
      for (int64_t c = 0; c < p.channels; ++c) x[c] = value(in.x[place(c)]), dy[c] = value(in.dy[place(c)]);
      const std::vector<A> y = lrn(p.lrn, x), dx = lrn_gradient(p.lrn, x, dy, &magnitude);
      for (int64_t c = 0; c < p.channels; ++c) {
        expect_near("y", place(c), got.y[place(c)], y[c], std::fabs(y[c]), rounding);
        expect_near("dx", place(c), got.dx[place(c)], dx[c], magnitude[c], rounding);
      }
    }
}

template <class A, class T>
void check(Isa isa, const LocalResponseNorm& p, const Tensors<T>& in) {
  Tensors<T> before{Array<T>(in.x.size()), Array<T>(in.x.size())};
  std::memcpy(before.x.data(), in.x.data(), in.x.size() * sizeof(T));
  std::memcpy(before.dy.data(), in.dy.data(), in.x.size() * sizeof(T));
  const Results<T> whole = run(isa, p, in, Split::whole);
  compare<A>(p, in, whole);
  for (Split split : {Split::units, Split::threads}) {
    const Results<T> again = run(isa, p, in, split);
    expect(whole.y.same_bits(again.y) && whole.dx.same_bits(again.dx), "the split of the units changes a result");
  }
  expect(before.x.same_bits(in.x) && before.dy.same_bits(in.dy), "an input was written to");
}

template <class T>
void describe(Isa isa, const LocalResponseNorm& p, const char* what) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " " + what + " " + std::to_string(p.batch) +
                   "x" + std::to_string(p.channels) + "x" + std::to_string(p.pixels) + " strides " +
                   std::to_string(p.batch_stride) + "," + std::to_string(p.channel_stride) + "," +
                   std::to_string(p.pixel_stride) + " n=" + std::to_string(p.lrn.size) + " beta=" + text(p.lrn.beta);
}

// alpha is far above AlexNet's 1e-4, at which a wrong window would hardly change a result.
template <class T>
void random_values(Isa isa) {
  constexpr Lrn kLrn{5, 1.5, 0.75, 2};
  const std::pair<Shape, Lrn> cases[] = {
      {{1, 1, 1}, kLrn},
      {{2, 7, 15}, kLrn},
      {{3, 1, 5}, kLrn},
      {{1, 5, 1}, kLrn},
      {{1, 8, 63}, kLrn},
      {{2, 15, 64}, kLrn},
      {{1, 17, 65}, kLrn},
      {{1, 33, 131}, kLrn},
      {{1, 65, 9}, kLrn},
      {{2, 6, 15}, {1, 1.5, 0.75, 2}},
      {{2, 6, 15}, {2, 1.5, 0.75, 2}},
      {{2, 6, 15}, {3, 1.5, 0.75, 2}},
      {{2, 6, 15}, {4, 1.5, 0.75, 2}},
      {{2, 6, 15}, {15, 1.5, 0.75, 2}},
      {{2, 6, 15}, {33, 1.5, 0.75, 2}},
      {{2, 19, 15}, {4, 1.5, 0.5, 2}},
      {{2, 19, 15}, {5, 1.5, 1, 2}},
      {{2, 19, 15}, {5, 1.5, 0, 2}},
      {{2, 9, 15}, {5, 1.5, 2, 2}},
      {{2, 9, 15}, {5, 1.5, -1, 2}},
      {{2, 9, 15}, {4, 1.5, 0.3, 2}},
      {{2, 96, 3}, {5, 5e-4, 0.75, 2}},
  };
  Random random(1);
  for (const auto& [shape, lrn] : cases)
    for (Order order : {Order::nchw, Order::nhwc, Order::channels_first, Order::batch_last}) {
      const LocalResponseNorm p = problem(kDType<T>, shape, lrn, order);
      describe<T>(isa, p, "random");
      const int64_t size = shape.batch * shape.channels * shape.pixels;
      Tensors<T> in{Array<T>(size), Array<T>(size)};
      for (int64_t i = 0; i < size; ++i) {
        in.x[i] = rounded<T>(normal(random));
        in.dy[i] = rounded<T>(normal(random));
      }
      check<double>(isa, p, in);
    }
}

// inf, NaN and squares that overflow affect their own windows only. A running sum would carry them into all channels.
template <class T>
void special_values(Isa isa) {
  const double inf = INFINITY, nan = NAN, big = sizeof(T) == 8 ? 1e200 : kDType<T> == DType::f16 ? 6e4 : 1e20;
  const double specials[] = {inf, -inf, nan, big, -big, 0, -0.0};
  for (const Lrn& lrn :
       {Lrn{3, 1, 0.75, 1}, Lrn{4, 1, 0.5, 1}, Lrn{5, 1, 1, 1}, Lrn{5, 1, 0.3, 1}, Lrn{3, 1, 0, 1}, Lrn{3, 1, 0.75, 0}})
    for (Order order : {Order::nchw, Order::nhwc}) {
      const Shape shape{1, 21, 7};
      const LocalResponseNorm p = problem(kDType<T>, shape, lrn, order);
      describe<T>(isa, p, "special");
      const int64_t size = shape.channels * shape.pixels;
      Tensors<T> in{Array<T>(size), Array<T>(size)};
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.pixels; ++i) {
          const int64_t at = c * p.channel_stride + i * p.pixel_stride;
          in.x[at] = rounded<T>(c == 9 ? specials[i] : c % 5 - 1.5);
          in.dy[at] = rounded<T>(c % 3 - 0.5);
        }
      check<Acc<T>>(isa, p, in);
    }
}

// With alpha = 0 and k = 1, y equals x. So every 16-bit number must survive widening and narrowing.
template <class T>
void all_halves(Isa isa) {
  const LocalResponseNorm p = problem(kDType<T>, {1, 64, 1024}, {5, 0, 0.75, 1}, Order::nchw);
  describe<T>(isa, p, "all values");
  Tensors<T> in{Array<T>(1 << 16), Array<T>(1 << 16)};
  for (int64_t i = 0; i < 1 << 16; ++i) in.x[i] = {static_cast<uint16_t>(i)}, in.dy[i] = rounded<T>(0);
  const Results<T> got = run(isa, p, in, Split::whole);
  for (int64_t i = 0; i < 1 << 16; ++i) {
    // A neighbour whose square is inf or NaN makes 0 * its square NaN. special_values covers these.
    bool finite = true;
    for (int64_t c = i / 1024 - 2; c <= i / 1024 + 2; ++c)
      if (c >= 0 && c < 64) {
        const float v = value(in.x[c * 1024 + i % 1024]);
        finite = finite && std::isfinite(v * v);
      }
    if (finite) expect_equal("y", i, got.y[i], value(in.x[i]));
  }
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas()) {
    for_types([&](auto type) {
      using T = typename decltype(type)::type;
      random_values<T>(isa);
      special_values<T>(isa);
    });
    all_halves<bf16>(isa);
    all_halves<f16>(isa);
  }
  return finish("local_response_norm");
}
