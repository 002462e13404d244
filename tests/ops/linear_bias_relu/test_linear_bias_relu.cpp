// Compares the linear layer and its gradients with plain sums in double.
#include "harness.h"
#include "linear_bias_relu/linear_bias_relu.h"

namespace alexnet_ext::test {
namespace {

template <class T>
Array<T> random_array(Random& random, int64_t n, double scale) {
  Array<T> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = rounded<T>(normal(random) * scale);
  return values;
}

template <class T>
Array<Acc<T>> packed(Isa isa, const LinearBiasRelu& p, int64_t columns, const Array<T>& source, Split split) {
  Array<Acc<T>> result(columns * padded_rows(p));
  with_isa(isa, [&](auto i) {
    run_units(split, ceil_div(columns, kPackRun), [&](int64_t begin, int64_t end) {
      pack_rows_cpu<i.value>(p, columns, source.data(), result.data(), begin, end);
    });
  });
  return result;
}

struct Sum {
  double value = 0, magnitude = 0;
  void add(double v) { value += v, magnitude += std::fabs(v); }
};

template <class T>
void check(Isa isa, int64_t rows, int64_t inputs, int64_t outputs, bool with_bias) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " " + std::to_string(rows) + " x " +
                   std::to_string(inputs) + " x " + std::to_string(outputs) + (with_bias ? " bias" : "");
  const LinearBiasRelu p{kDType<T>, rows, inputs, outputs};
  Random random(rows + 100 * inputs + 10000 * outputs);
  const Array<T> x = random_array<T>(random, rows * inputs, 1), weight = random_array<T>(random, outputs * inputs, 0.3),
                 bias = random_array<T>(random, outputs, 1), dz = random_array<T>(random, rows * outputs, 1);
  Array<T> nan_weight(outputs * inputs);
  for (int64_t i = 0; i < nan_weight.size(); ++i) nan_weight[i] = rounded<T>(NAN);
  for (Split split : kSplits) {
    Array<T> y(rows * outputs), nan_y(rows * outputs), dx(rows * inputs), dweight(outputs * inputs), dbias(outputs),
        alone(outputs);
    with_isa(isa, [&](auto i) {
      const Array<Acc<T>> x_packed = packed(isa, p, inputs, x, split), dz_packed = packed(isa, p, outputs, dz, split);
      run_units(split, ceil_div(outputs, kForwardOutputs), [&](int64_t begin, int64_t end) {
        linear_bias_relu_cpu<i.value>(p, x.data(), x_packed.data(), weight.data(), with_bias ? bias.data() : nullptr,
                                      y.data(), begin, end);
        linear_bias_relu_cpu<i.value>(p, x.data(), x_packed.data(), nan_weight.data(), nullptr, nan_y.data(), begin,
                                      end);
      });
      run_units(split, ceil_div(inputs, kInputs), [&](int64_t begin, int64_t end) {
        linear_input_gradient_cpu<i.value>(p, dz_packed.data(), weight.data(), dx.data(), begin, end);
      });
      run_units(split, ceil_div(outputs, kWeightOutputs), [&](int64_t begin, int64_t end) {
        linear_weight_gradient_cpu<i.value>(p, dz.data(), x.data(), dweight.data(), dbias.data(), begin, end);
        linear_weight_gradient_cpu<i.value>(p, dz.data(), x.data(), nullptr, alone.data(), begin, end);
      });
    });
    expect(dbias.same_bits(alone), "dbias differs when dweight is left out");
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < outputs; ++n) {
        Sum z;
        for (int64_t k = 0; k < inputs; ++k) z.add(value(x[m * inputs + k]) * value(weight[n * inputs + k]));
        if (with_bias) z.add(value(bias[n]));
        expect_near("y", m * outputs + n, y[m * outputs + n], z.value > 0 ? z.value : 0, z.magnitude, inputs + 4.0);
        expect(value(nan_y[m * outputs + n]) != value(nan_y[m * outputs + n]), "a NaN came out as a number");
      }
      for (int64_t k = 0; k < inputs; ++k) {
        Sum gradient;
        for (int64_t n = 0; n < outputs; ++n) gradient.add(value(dz[m * outputs + n]) * value(weight[n * inputs + k]));
        expect_near("dx", m * inputs + k, dx[m * inputs + k], gradient.value, gradient.magnitude, outputs + 4.0);
      }
    }
    for (int64_t n = 0; n < outputs; ++n) {
      Sum for_bias;
      for (int64_t m = 0; m < rows; ++m) for_bias.add(value(dz[m * outputs + n]));
      expect_near("dbias", n, dbias[n], for_bias.value, for_bias.magnitude, rows + 4.0);
      for (int64_t k = 0; k < inputs; ++k) {
        Sum gradient;
        for (int64_t m = 0; m < rows; ++m) gradient.add(value(dz[m * outputs + n]) * value(x[m * inputs + k]));
        expect_near("dweight", n * inputs + k, dweight[n * inputs + k], gradient.value, gradient.magnitude, rows + 4.0);
      }
    }
  }
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas())
    for_types([&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t rows : {1, 7, 8, 15, 16, 17, 32, 33, 49, 70}) check<T>(isa, rows, 37, 29, rows % 2 != 0);
      for (int64_t inputs : {1, 511, 512, 513, 1030})
        check<T>(isa, 9, inputs, 13, true), check<T>(isa, 3, inputs, 5, false);
      for (int64_t outputs : {1, 12, 13, 48, 49, 127, 128, 129}) check<T>(isa, 11, 19, outputs, true);
    });
  return finish("linear_bias_relu");
}
