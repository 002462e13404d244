// Winograd's transforms with plain products between them, against a plain convolution and its gradients in double.
#include "conv2d_bias_relu/conv2d_bias_relu.h"
#include "conv2d_bias_relu/cpu/winograd.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

// product[row][column] = sum over the middle of a * b, for each place and group; either may be read transposed.
struct Factor {
  const Array<float>& values;
  int64_t rows, columns;  // as they stand
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

// Each transform sums at most 16 values of about this size, twice.
constexpr double kRounding = 64;

void check(Isa isa, Images in, int64_t outputs, int64_t groups, int64_t pad_h, int64_t pad_w, bool strided) {
  const Images out{in.batch, outputs * groups, in.height + 2 * pad_h - 2, in.width + 2 * pad_w - 2, true};
  const int64_t tiles_h = ceil_div(out.height, 2), tiles_w = ceil_div(out.width, 2), tiles = tiles_h * tiles_w;
  const Winograd p{in, out, groups, {pad_h, pad_w}, tiles_h, tiles_w, in.batch * tiles};
  const int64_t inputs = p.inputs(), matrices = kPlaces * groups;
  report().where = std::string(isa_name(isa)) + " " + std::to_string(in.batch) + "x" + std::to_string(in.channels) +
                   "x" + std::to_string(in.height) + "x" + std::to_string(in.width) + " to " +
                   std::to_string(out.channels) + " groups " + std::to_string(groups) + " padding " +
                   std::to_string(pad_h) + "," + std::to_string(pad_w) + (strided ? " strided weight" : "");
  const bool relu = !strided;
  Random random(in.height * 100 + in.width);
  const Array<float> x = random_array(random, in.batch * in.channels * in.height * in.width),
                     dy = random_array(random, out.batch * out.channels * out.height * out.width),
                     bias = random_array(random, out.channels);
  Array<float> weight = random_array(random, out.channels * inputs * 9);
  const Weight3x3 w = strided ? Weight3x3{weight.data(), {inputs * 9, 1, 3 * inputs, inputs}}
                              : Weight3x3{weight.data(), {inputs * 9, 9, 3, 1}};
  auto weight_at = [&](int64_t k, int64_t c, int64_t r, int64_t s) {
    return k * w.strides[0] + c * w.strides[1] + r * w.strides[2] + s * w.strides[3];
  };
  for (Split split : kSplits) {
    const int64_t rows = p.capacity, units = in.batch * tiles_h;
    Array<float> u(matrices * outputs * inputs), v(matrices * rows * inputs), m(matrices * rows * outputs),
        z(matrices * rows * outputs), dv(matrices * rows * inputs), du(matrices * outputs * inputs);
    Array<float> y(dy.size()), dx(x.size()), dweight(weight.size());
    with_isa(isa, [&](auto i) {
      run_units(split, out.channels,
                [&](int64_t begin, int64_t end) { winograd_weight_cpu<i.value>(p, w, u.data(), begin, end); });
      run_units(split, units, [&](int64_t begin, int64_t end) {
        winograd_input_cpu<i.value>(p, x.data(), v.data(), 0, begin, end);
        winograd_output_transposed_cpu<i.value>(p, dy.data(), z.data(), 0, begin, end);
      });
      multiply(matrices, rows, inputs, outputs, {v, rows, inputs, false}, {u, outputs, inputs, true}, m.data());
      multiply(matrices, rows, outputs, inputs, {z, rows, outputs, false}, {u, outputs, inputs, false}, dv.data());
      multiply(matrices, outputs, rows, inputs, {z, rows, outputs, true}, {v, rows, inputs, false}, du.data());
      run_units(split, units, [&](int64_t begin, int64_t end) {
        if (!winograd_output_cpu<i.value>(p, m.data(), bias.data(), least_of(relu), y.data(), 0, begin, end))
          expect(false, "finite values pass for others");
      });
      run_units(split, in.batch * groups * channel_blocks(p), [&](int64_t begin, int64_t end) {
        if (!winograd_input_transposed_cpu<i.value>(p, dv.data(), dx.data(), 0, begin, end))
          expect(false, "finite values pass for others");
      });
      run_units(split, out.channels, [&](int64_t begin, int64_t end) {
        const Weight3x3 to{dweight.data(), {w.strides[0], w.strides[1], w.strides[2], w.strides[3]}};
        if (!winograd_weight_transposed_cpu<i.value>(p, du.data(), 1, to, begin, end))
          expect(false, "finite values pass for others");
      });
    });
    std::vector<Sum> for_x(x.size()), for_weight(weight.size());
    for (int64_t n = 0; n < out.batch; ++n)
      for (int64_t k = 0; k < out.channels; ++k)
        for (int64_t h = 0; h < out.height; ++h)
          for (int64_t q = 0; q < out.width; ++q) {
            const int64_t o = at(out, n, k, h, q);
            Sum sum;
            sum.add(bias[k]);
            for (int64_t c = 0; c < inputs; ++c)
              for (int64_t r = 0; r < 3; ++r)
                for (int64_t s = 0; s < 3; ++s) {
                  const int64_t ih = h + r - pad_h, iw = q + s - pad_w;
                  if (ih < 0 || ih >= in.height || iw < 0 || iw >= in.width) continue;
                  const int64_t a = at(in, n, k / outputs * inputs + c, ih, iw), b = weight_at(k, c, r, s);
                  sum.add(static_cast<double>(x[a]) * weight[b]);
                  for_x[a].add(static_cast<double>(dy[o]) * weight[b]);
                  for_weight[b].add(static_cast<double>(dy[o]) * x[a]);
                }
            expect_near("y", o, y[o], relu && sum.value < 0 ? 0 : sum.value, sum.magnitude + 16, kRounding);
          }
    for (int64_t i = 0; i < dx.size(); ++i)
      expect_near("dx", i, dx[i], for_x[i].value, for_x[i].magnitude + 16, kRounding);
    for (int64_t i = 0; i < dweight.size(); ++i)
      expect_near("dweight", i, dweight[i], for_weight[i].value, for_weight[i].magnitude + 16, kRounding);
  }
}

// A value that is not finite is noticed wherever it stands, and NaN passes the ReLU.
void check_finite(Isa isa, float odd) {
  report().where = std::string(isa_name(isa)) + " not finite";
  const Images images{1, 16, 4, 4, true};
  const Winograd p{images, images, 1, {1, 1}, 2, 2, 4};
  for (int64_t place = 0; place < 16; ++place) {
    Array<float> m(kPlaces * 4 * 16), y(16 * 16), dx(16 * 16), dweight(16 * 16 * 9), du(kPlaces * 16 * 16);
    for (int64_t i = 0; i < m.size(); ++i) m[i] = 1;
    for (int64_t i = 0; i < du.size(); ++i) du[i] = 1;
    // The tile in the middle of nothing: each of its places is part of some result.
    for (int64_t t = 0; t < 4; ++t) m[(place * 4 + t) * 16 + 5] = odd;
    du[(place * 16 + 3) * 16 + 7] = odd;
    with_isa(isa, [&](auto i) {
      expect(!winograd_output_cpu<i.value>(p, m.data(), nullptr, least_of(true), y.data(), 0, 0, 2),
             "y passes for finite");
      expect(!winograd_input_transposed_cpu<i.value>(p, m.data(), dx.data(), 0, 0, 1), "dx passes for finite");
      const Weight3x3 to{dweight.data(), {16 * 9, 9, 3, 1}};
      expect(!winograd_weight_transposed_cpu<i.value>(p, du.data(), 1, to, 0, 16), "dweight passes for finite");
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
