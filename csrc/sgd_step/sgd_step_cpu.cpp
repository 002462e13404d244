// A step of SGD on the CPU, in blocks that stay in the first-level cache. Each line of the formula is a loop of its
// own, so that no loop has a branch.
#include "../common/cpu_vector.h"
#include "sgd_step.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

constexpr int64_t kBlock = 512;

// a * b + c, rounded once where the instruction set can.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <class A>
inline A fused(A a, A b, A c) {
  return a * b + c;
}
#endif

template <class A>
struct Constants {
  A lr, mu, rest, decay, scale;
  bool nesterov, maximize, first_step;

  explicit Constants(const SgdStep& step)
      : lr(step.lr_tensor ? static_cast<A>(*step.lr_tensor) : static_cast<A>(step.lr)),
        mu(static_cast<A>(step.mu)),
        rest(static_cast<A>(1 - step.dampening)),
        decay(static_cast<A>(step.weight_decay)),
        scale(step.grad_scale ? static_cast<A>(*step.grad_scale) : A(1)),
        nesterov(step.nesterov),
        maximize(step.maximize),
        first_step(step.first_step) {}
};

template <class T, class A>
void update(const Constants<A>& c, A* __restrict p, A* __restrict m, const T* __restrict g, T* __restrict w,
            int64_t n) {
  A u[kBlock];
  load_row<T>(u, g, n);
  if (c.scale != 1)
    for (int64_t i = 0; i < n; ++i) u[i] /= c.scale;
  if (c.maximize)
    for (int64_t i = 0; i < n; ++i) u[i] = -u[i];
  if (c.decay != 0)
    for (int64_t i = 0; i < n; ++i) u[i] = fused(c.decay, p[i], u[i]);
  if (m != nullptr) {
    if (c.first_step)
      std::memcpy(m, u, n * sizeof(A));
    else
      for (int64_t i = 0; i < n; ++i) m[i] = fused(c.rest, u[i], c.mu * m[i]);
    if (c.nesterov)
      for (int64_t i = 0; i < n; ++i) u[i] = fused(c.mu, m[i], u[i]);
    else
      std::memcpy(u, m, n * sizeof(A));
  }
  for (int64_t i = 0; i < n; ++i) p[i] = fused(-c.lr, u[i], p[i]);
  if (w != nullptr) store_row<T>(w, p, n);
}

template <class T>
T* at(T* buffer, int64_t offset) {
  return buffer == nullptr ? nullptr : buffer + offset;
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void sgd_step_cpu<Isa::ALEXNET_ISA>(const SgdStep& step, const SgdTensor* tensors, int64_t count, int64_t begin,
                                    int64_t end) {
  if (step.found_inf != nullptr && *step.found_inf != 0) return;
  with_type(step.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const Constants<A> constants(step);
    for (int64_t t = 0, first = 0; t < count && first < end; first += sgd_step_units(tensors[t]), ++t) {
      const SgdTensor& tensor = tensors[t];
      const int64_t from = begin > first ? (begin - first) * kSgdRun : 0;
      const int64_t to = (end - first) * kSgdRun < tensor.size ? (end - first) * kSgdRun : tensor.size;
      for (int64_t i = from; i < to; i += kBlock)
        update<T, A>(constants, static_cast<A*>(tensor.parameter) + i, at(static_cast<A*>(tensor.momentum), i),
                     static_cast<const T*>(tensor.gradient) + i, at(static_cast<T*>(tensor.weight), i),
                     to - i < kBlock ? to - i : kBlock);
    }
  });
}

}  // namespace alexnet_ext
