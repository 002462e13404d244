// Compares Winograd's transforms, with plain products between them, with a convolution and its gradients in double.
#include "conv2d_bias_relu/conv2d_bias_relu.h"
#include "conv2d_bias_relu/cpu/winograd.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

// A factor of product[row][column] = sum over the middle of a * b, for each place and group. It may be read transposed.
struct Factor {
  const Array<float>& values;
  int64_t rows, columns;  // as stored
  bool transposed;
  float at(int64_t matrix, int64_t i, int64_t j) const {
    return values[matrix * rows * columns + (transposed ? j * columns + i : i * columns + j)];
  }
};

void multiply(int64_t matrices, int64_t rows, int64_t middle, int64_t columns, const Factor& a, const Factor& b,
              float* product) {
  for (int64_t matrix = 0; matrix < matrices; ++matrix)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < middle; ++k) sum += static_cast<double>(a.at(matrix, i, k)) * b.at(matrix, k, j);
        product[(matrix * rows + i) * columns + j] = static_cast<float>(sum);
      }
}

Array<float> random_array(Random& random, int64_t n) {
  Array<float> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(normal(random));
  return values;
}

int64_t at(const Images& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return ((n * s.height + h) * s.width + w) * s.channels + c;
}

struct Sum {
  double value = 0, magnitude = 0;
  void add(double v) { value += v, magnitude += std::fabs(v); }
};

// The inputs of one convolution and its gradients. A strided weight has its channels last.
struct Problem {
  Winograd p;
  bool relu;
  Array<float> x, dy, bias, weight;
  Weight3x3 w;

  Problem(const Images& in, int64_t outputs, int64_t groups, int64_t pad_h, int64_t pad_w, bool strided, Random random)
      : p{in,     {in.batch, outputs * groups, in.height + 2 * pad_h - 2, in.width + 2 * pad_w - 2, true},
          groups, {pad_h, pad_w},
          0,      0,
          0},
        relu(!strided),
        x(random_array(random, in.batch * in.channels * in.height * in.width)),
        dy(random_array(random, p.out.batch * p.out.channels * p.out.height * p.out.width)),
        bias(random_array(random, p.out.channels)),
        weight(random_array(random, p.out.channels * p.inputs() * 9)),
        w(strided ? Weight3x3{weight.data(), {p.inputs() * 9, 1, 3 * p.inputs(), p.inputs()}}
                  : Weight3x3{weight.data(), {p.inputs() * 9, 9, 3, 1}}) {
    p.tiles_h = ceil_div(p.out.height, 2), p.tiles_w = ceil_div(p.out.width, 2);
    p.capacity = in.batch * p.tiles_h * p.tiles_w;
  }

  int64_t weight_at(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return k * w.strides[0] + c * w.strides[1] + r * w.strides[2] + s * w.strides[3];
  }
};

struct Results {
  Array<float> y, dx, dweight;
};

Results convolve(Isa isa, Split split, const Problem& problem) {
  const Winograd& p = problem.p;
  const int64_t inputs = p.inputs(), outputs = p.outputs(), matrices = kPlaces * p.groups, rows = p.capacity;
  const int64_t units = p.in.batch * p.tiles_h;
  Array<float> u(matrices * outputs * inputs), v(matrices * rows * inputs), m(matrices * rows * outputs),
      z(matrices * rows * outputs), dv(matrices * rows * inputs), du(matrices * outputs * inputs);
  Results found{Array<float>(problem.dy.size()), Array<float>(problem.x.size()), Array<float>(problem.weight.size())};
  const auto expect_finite = [](bool finite) {
    if (!finite) expect(false, "finite values are reported as not finite");
  };
  with_isa(isa, [&](auto i) {
    run_units(split, p.out.channels,
              [&](int64_t begin, int64_t end) { winograd_weight_cpu<i.value>(p, problem.w, u.data(), begin, end); });
    run_units(split, units, [&](int64_t begin, int64_t end) {
      winograd_input_cpu<i.value>(p, problem.x.data(), v.data(), 0, begin, end);
      winograd_output_transposed_cpu<i.value>(p, problem.dy.data(), z.data(), 0, begin, end);
    });
    multiply(matrices, rows, inputs, outputs, {v, rows, inputs, false}, {u, outputs, inputs, true}, m.data());
    multiply(matrices, rows, outputs, inputs, {z, rows, outputs, false}, {u, outputs, inputs, false}, dv.data());
    multiply(matrices, outputs, rows, inputs, {z, rows, outputs, true}, {v, rows, inputs, false}, du.data());
    run_units(split, units, [&](int64_t begin, int64_t end) {
      expect_finite(winograd_output_cpu<i.value>(p, m.data(), problem.bias.data(), least_of(problem.relu),
                                                 found.y.data(), 0, begin, end));
    });
    run_units(split, p.in.batch * p.groups * channel_blocks(p), [&](int64_t begin, int64_t end) {
      expect_finite(winograd_input_transposed_cpu<i.value>(p, dv.data(), found.dx.data(), 0, begin, end));
    });
    run_units(split, p.out.channels, [&](int64_t begin, int64_t end) {
      const int64_t* to = problem.w.strides;
      expect_finite(winograd_weight_transposed_cpu<i.value>(
          p, du.data(), 1, {found.dweight.data(), {to[0], to[1], to[2], to[3]}}, begin, end));
    });
  });
  return found;
}

// Each transform sums at most 16 values of about this size, twice.
constexpr double kRounding = 64;

// Against the sums over taps, in double.
void compare(const Problem& problem, const Results& found) {
  const Images &in = problem.p.in, &out = problem.p.out;
  const int64_t inputs = problem.p.inputs(), outputs = problem.p.outputs();
  const Array<float>&x = problem.x, &dy = problem.dy, &weight = problem.weight;
  std::vector<Sum> for_x(x.size()), for_weight(weight.size());
  for (int64_t n = 0; n < out.batch; ++n)
    for (int64_t k = 0; k < out.channels; ++k)
      for (int64_t h = 0; h < out.height; ++h)
        for (int64_t q = 0; q < out.width; ++q) {
          const int64_t o = at(out, n, k, h, q);
          Sum sum;
          sum.add(problem.bias[k]);
          for (int64_t c = 0; c < inputs; ++c)
            for (int64_t r = 0; r < 3; ++r)
              for (int64_t s = 0; s < 3; ++s) {
                const int64_t ih = h + r - problem.p.padding[0], iw = q + s - problem.p.padding[1];
                if (ih < 0 || ih >= in.height || iw < 0 || iw >= in.width) continue;
                const int64_t a = at(in, n, k / outputs * inputs + c, ih, iw), b = problem.weight_at(k, c, r, s);
                sum.add(static_cast<double>(x[a]) * weight[b]);
                for_x[a].add(static_cast<double>(dy[o]) * weight[b]);
                for_weight[b].add(static_cast<double>(dy[o]) * x[a]);
              }
          const double exact = problem.relu && sum.value < 0 ? 0 : sum.value;
          expect_near("y", o, found.y[o], exact, sum.magnitude + 16, kRounding);
        }
  for (int64_t i = 0; i < x.size(); ++i)
    expect_near("dx", i, found.dx[i], for_x[i].value, for_x[i].magnitude + 16, kRounding);
  for (int64_t i = 0; i < weight.size(); ++i)
    expect_near("dweight", i, found.dweight[i], for_weight[i].value, for_weight[i].magnitude + 16, kRounding);
}

void check(Isa isa, const Images& in, int64_t outputs, int64_t groups, int64_t pad_h, int64_t pad_w, bool strided) {
  const Problem problem(in, outputs, groups, pad_h, pad_w, strided, Random(in.height * 100 + in.width));
  report().where = std::string(isa_name(isa)) + " " + std::to_string(in.batch) + "x" + std::to_string(in.channels) +
                   "x" + std::to_string(in.height) + "x" + std::to_string(in.width) + " to " +
                   std::to_string(outputs * groups) + " groups " + std::to_string(groups) + " padding " +
                   std::to_string(pad_h) + "," + std::to_string(pad_w) + (strided ? " strided weight" : "");
  for (Split split : kSplits) compare(problem, convolve(isa, split, problem));
}

// A value that is not finite is noticed at every place.
void check_finite(Isa isa, float odd) {
  report().where = std::string(isa_name(isa)) + " not finite";
  const Images images{1, 16, 4, 4, true};
  const Winograd p{images, images, 1, {1, 1}, 2, 2, 4};
  for (int64_t place = 0; place < 16; ++place) {
    Array<float> m(kPlaces * 4 * 16), y(16 * 16), dx(16 * 16), dweight(16 * 16 * 9), du(kPlaces * 16 * 16);
    for (int64_t i = 0; i < m.size(); ++i) m[i] = 1;
    for (int64_t i = 0; i < du.size(); ++i) du[i] = 1;
    // Sets this place in every tile, as each place of a tile is part of some result.
    for (int64_t t = 0; t < 4; ++t) m[(place * 4 + t) * 16 + 5] = odd;
    du[(place * 16 + 3) * 16 + 7] = odd;
    with_isa(isa, [&](auto i) {
      expect(!winograd_output_cpu<i.value>(p, m.data(), nullptr, least_of(true), y.data(), 0, 0, 2),
             "y is reported as finite");
      expect(!winograd_input_transposed_cpu<i.value>(p, m.data(), dx.data(), 0, 0, 1), "dx is reported as finite");
      const Weight3x3 to{dweight.data(), {16 * 9, 9, 3, 1}};
      expect(!winograd_weight_transposed_cpu<i.value>(p, du.data(), 1, to, 0, 16), "dweight is reported as finite");
    });
  }
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas()) {
    check(isa, {2, 16, 5, 4, true}, 16, 1, 1, 1, false);
    check(isa, {1, 96, 7, 6, true}, 16, 2, 1, 1, true);  // 48 channels a group: a block of 32, and one of 16
    check(isa, {3, 32, 3, 3, true}, 32, 1, 0, 0, false);
    check(isa, {1, 32, 4, 7, true}, 16, 2, 0, 2, true);
    check(isa, {1, 16, 1, 1, true}, 16, 1, 1, 1, false);
    for (float odd : {NAN, INFINITY, -INFINITY}) check_finite(isa, odd);
  }
  return finish("winograd");
}
