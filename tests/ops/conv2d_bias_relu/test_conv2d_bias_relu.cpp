// The ReLU behind the convolution and its mask, to the bit, NaN, inf, -0 and runs of every length included.
#include "conv2d_bias_relu/conv2d_bias_relu.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

template <class T>
T element(Random& random) {
  const double specials[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0};
  const int64_t pick = integer(random, 0, 19);
  return rounded<T>(pick < 5 ? specials[pick] : normal(random));
}

template <class T>
void check(Isa isa, int64_t n) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " n=" + std::to_string(n);
  Random random(n);
  Array<T> z(n), dy(n);
  for (int64_t i = 0; i < n; ++i) z[i] = element<T>(random), dy[i] = element<T>(random);
  for (Split split : kSplits) {
    Array<T> y(n), dz(n), in_place(n);
    std::memcpy(y.data(), z.data(), n * sizeof(T));
    std::memcpy(in_place.data(), dy.data(), n * sizeof(T));
    with_isa(isa, [&](auto i) {
      const int64_t units = ceil_div(n, kReluRun);
      run_units(split, units,
                [&](int64_t begin, int64_t end) { relu_inplace_cpu<i.value>(kDType<T>, y.data(), n, begin, end); });
      run_units(split, units, [&](int64_t begin, int64_t end) {
        relu_mask_cpu<i.value>(kDType<T>, dy.data(), y.data(), dz.data(), n, begin, end);
      });
      run_units(split, units, [&](int64_t begin, int64_t end) {
        relu_mask_cpu<i.value>(kDType<T>, in_place.data(), y.data(), in_place.data(), n, begin, end);
      });
    });
    for (int64_t i = 0; i < n; ++i) {
      const bool passes = !(value(z[i]) <= 0);
      expect_equal("y", i, y[i], passes ? value(z[i]) : 0);
      expect_equal("dz", i, dz[i], passes ? value(dy[i]) : 0);
    }
    expect(dz.same_bits(in_place), "dz in place of dy differs");
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
      for (int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 1000}) check<T>(isa, n);
      for (int64_t n : {kReluRun - 1, kReluRun, kReluRun + 1, 3 * kReluRun + 5}) check<T>(isa, n);
    });
  return finish("conv2d_bias_relu");
}
