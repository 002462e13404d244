// A step of SGD compared with the formula in double, and weights with the parameters, to the bit.
#include "harness.h"
#include "sgd_step/sgd_step.h"

namespace alexnet_ext::test {
namespace {

struct Settings {
  double mu, dampening, decay;
  bool nesterov, maximize, first_step;
};

template <class T>
struct Buffers {
  Array<Acc<T>> parameter, momentum;
  Array<T> gradient, weight;

  Buffers(int64_t n, Random& random) : parameter(n), momentum(n), gradient(n), weight(n) {
    for (int64_t i = 0; i < n; ++i) {
      parameter[i] = static_cast<Acc<T>>(normal(random)), momentum[i] = static_cast<Acc<T>>(normal(random));
      gradient[i] = rounded<T>(normal(random));
    }
  }
};

template <class T>
void check(Isa isa, const std::vector<int64_t>& sizes, const Settings& set, Split split, float scale, float found) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " of " + std::to_string(sizes[0]) +
                   ": mu=" + text(set.mu) + " decay=" + text(set.decay) + " nesterov=" + std::to_string(set.nesterov) +
                   " first=" + std::to_string(set.first_step) + " scale=" + text(scale);
  constexpr double kLr = 0.1;
  const bool low = sizeof(T) == 2;
  Random random(7);
  std::vector<Buffers<T>> before, after;
  std::vector<SgdTensor> tensors;
  Random same(7);
  for (int64_t n : sizes) before.emplace_back(n, random), after.emplace_back(n, same);
  int64_t units = 0;
  for (Buffers<T>& b : after) {
    tensors.push_back({b.parameter.data(), set.mu == 0 ? nullptr : b.momentum.data(), b.gradient.data(),
                       low ? b.weight.data() : nullptr, b.parameter.size()});
    units += sgd_step_units(tensors.back());
  }
  const SgdStep step{kDType<T>,    kLr,          set.mu,         set.dampening, set.decay,
                     set.nesterov, set.maximize, set.first_step, nullptr,       scale == 1 ? nullptr : &scale,
                     &found};
  with_isa(isa, [&](auto i) {
    run_units(split, units, [&](int64_t begin, int64_t end) {
      sgd_step_cpu<i.value>(step, tensors.data(), static_cast<int64_t>(tensors.size()), begin, end);
    });
  });
  for (size_t t = 0; t < sizes.size(); ++t)
    for (int64_t i = 0; i < sizes[t]; ++i) {
      const double old = value(before[t].parameter[i]), m = value(before[t].momentum[i]);
      const double sign = set.maximize ? -1 : 1, g = sign * value(before[t].gradient[i]) / scale + set.decay * old;
      const double next = set.mu == 0 ? m : set.first_step ? g : set.mu * m + (1 - set.dampening) * g;
      const double u = set.mu == 0 ? g : set.nesterov ? g + set.mu * next : next;
      expect_near("momentum", i, after[t].momentum[i], found != 0 ? m : next, 10, 4);
      expect_near("parameter", i, after[t].parameter[i], found != 0 ? old : old - kLr * u, 10, 4);
      expect_equal("gradient", i, after[t].gradient[i], value(before[t].gradient[i]));
      const T weight = low && found == 0 ? rounded<T>(value(after[t].parameter[i])) : before[t].weight[i];
      expect(std::memcmp(&weight, &after[t].weight[i], sizeof weight) == 0, "weight is not its parameter rounded");
    }
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  const Settings settings[] = {{0.9, 0, 0.03, false, false, false}, {0.9, 0.2, 0.03, false, false, true},
                               {0.9, 0, 0, true, true, false},      {0.9, 0.2, 0.03, false, true, false},
                               {0, 0, 0.03, false, false, false},   {0, 0, 0, false, true, false}};
  for (Isa isa : isas())
    for_types([&](auto type) {
      using T = typename decltype(type)::type;
      for (Split split : kSplits)
        for (const Settings& set : settings) {
          check<T>(isa, {1, 2, 3, 7, 8, 0, 9, 15, 16, 17, 31, 33, 63, 65}, set, split, 1, 0);
          check<T>(isa, {511, 512, 513, 1100}, set, split, 8, 0);
          check<T>(isa, {5, 600}, set, split, 1, 1);
        }
      for (Split split : kSplits) check<T>(isa, {kSgdRun - 1, kSgdRun, kSgdRun + 1, 3}, settings[0], split, 1, 0);
    });
  return finish("sgd_step");
}
