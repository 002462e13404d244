// ReLU's gradient, to the bit: NaN, inf, -0, runs of every length, and dz in place of dy.
#include "common/relu_mask.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

template <class T>
void check(Isa isa, int64_t n) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " n=" + std::to_string(n);
  Random random(n);
  Array<T> y(n), dy(n);
  for (int64_t i = 0; i < n; ++i) y[i] = special_or_normal<T>(random), dy[i] = special_or_normal<T>(random);
  for (Split split : kSplits) {
    Array<T> dz(n), in_place(n);
    std::memcpy(in_place.data(), dy.data(), n * sizeof(T));
    with_isa(isa, [&](auto i) {
      run_units(split, relu_units(n), [&](int64_t begin, int64_t end) {
        relu_mask_cpu<i.value>(kDType<T>, dy.data(), y.data(), dz.data(), n, begin, end);
        relu_mask_cpu<i.value>(kDType<T>, in_place.data(), y.data(), in_place.data(), n, begin, end);
      });
    });
    for (int64_t i = 0; i < n; ++i) expect_equal("dz", i, dz[i], value(y[i]) <= 0 ? 0 : value(dy[i]));
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
  return finish("relu_mask");
}
