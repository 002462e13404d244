// The ReLU after the convolution, to the bit: NaN, inf, -0 and runs of every length.
#include "conv2d_bias_relu/conv2d_bias_relu.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

template <class T>
void check(Isa isa, int64_t n) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " n=" + std::to_string(n);
  Random random(n);
  Array<T> z(n);
  for (int64_t i = 0; i < n; ++i) z[i] = special_or_normal<T>(random);
  for (Split split : kSplits) {
    Array<T> y(n);
    std::memcpy(y.data(), z.data(), n * sizeof(T));
    with_isa(isa, [&](auto i) {
      run_units(split, relu_units(n),
                [&](int64_t begin, int64_t end) { relu_inplace_cpu<i.value>(kDType<T>, y.data(), n, begin, end); });
    });
    for (int64_t i = 0; i < n; ++i) expect_equal("y", i, y[i], value(z[i]) <= 0 ? 0 : value(z[i]));
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
