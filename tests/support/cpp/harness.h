// Shared by the plain C++ tests of the CPU kernels.
//   elements are converted independently of the kernels
//   arrays have their exact size, so that AddressSanitizer sees an access one element too far
//   every instruction set of this CPU is tested
//   units are split over calls and threads in several ways, for ThreadSanitizer; no split may change a bit
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "common/types.h"

namespace alexnet_ext::test {

// ---- failures, a sentence each; the first 20 are printed

struct Report {
  int64_t checks = 0, failures = 0;
  std::string where;  // the current case
};

inline Report& report() {
  static Report r;
  return r;
}

inline void expect(bool holds, const std::string& what) {
  Report& r = report();
  ++r.checks;
  if (holds || ++r.failures > 20) return;
  std::printf("FAILED %s: %s\n", r.where.c_str(), what.c_str());
}

// Returns the exit code. A test without any check has failed.
inline int finish(const char* name) {
  const Report& r = report();
  std::printf("%s: %lld checks, %lld failures\n", name, static_cast<long long>(r.checks),
              static_cast<long long>(r.failures));
  return r.failures == 0 && r.checks > 0 ? 0 : 1;
}

// ---- instruction sets

inline std::vector<Isa> isas() {
  std::vector<Isa> found{Isa::portable};
#if defined(ALEXNET_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(ALEXNET_NARROW)
  const bool avx512 = avx2;
  const char* made_of = " (of AVX2 instructions)";
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const char* made_of = "";
#endif
  if (avx2) found.push_back(Isa::avx2);
  if (avx512) found.push_back(Isa::avx512);
  std::printf("instruction sets: portable%s%s%s\n", avx2 ? ", avx2" : " (this CPU has no avx2)",
              avx512 ? ", avx512" : " (this CPU has no avx512)", made_of);
#else
  std::printf("instruction sets: portable (the only one built)\n");
#endif
  std::fflush(stdout);
  return found;
}

// ---- elements

template <class T>
constexpr DType kDType = DType::f64;
template <>
constexpr DType kDType<float> = DType::f32;
template <>
constexpr DType kDType<bf16> = DType::bf16;
template <>
constexpr DType kDType<f16> = DType::f16;

template <class T>
const char* dtype_name() {
  return kDType<T> == DType::f64 ? "f64" : kDType<T> == DType::f32 ? "f32" : kDType<T> == DType::bf16 ? "bf16" : "f16";
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline double value(double v) { return v; }
inline double value(float v) { return v; }
inline double value(bf16 v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }
inline double value(f16 v) { return static_cast<double>(bits_as<_Float16>(v.bits)); }

// v, rounded to the nearest T, ties to even.
template <class T>
T rounded(double v) {
  if constexpr (kDType<T> == DType::f16) {
    return {bits_as<uint16_t>(static_cast<_Float16>(v))};
  } else if constexpr (kDType<T> == DType::bf16) {
    const uint32_t bits = bits_as<uint32_t>(static_cast<float>(v));
    const uint16_t below = bits >> 16, above = below + 1;
    if (!std::isfinite(v)) return {static_cast<uint16_t>(v != v ? 0x7fc0 : below)};
    const double to_below = std::fabs(v - value(bf16{below}));
    const double to_above = std::fabs(value(bf16{above}) - v);
    return {to_below < to_above || (to_below == to_above && below % 2 == 0) ? below : above};
  } else {
    return static_cast<T>(v);
  }
}

// Half a unit in the last place of T at v; 0 for fp32 and fp64, whose kernels store results without rounding.
template <class T>
double half_ulp(double v) {
  if (sizeof(T) != 2) return 0;
  const int digits = kDType<T> == DType::bf16 ? 8 : 11, lowest = kDType<T> == DType::bf16 ? -126 : -14;
  const int exponent = v == 0 ? lowest : std::ilogb(v);
  return std::ldexp(1.0, (exponent < lowest ? lowest : exponent) - digits);
}

template <class T>
constexpr double kEpsilon = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;

// ---- arrays of exact size, filled at first with a pattern that is no right answer

template <class T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size), data_(static_cast<T*>(std::malloc(size * sizeof(T)))) {
    std::memset(data_, 0xfe, size * sizeof(T));
  }
  Array(Array&& other) noexcept : size_(other.size_), data_(other.data_) { other.data_ = nullptr; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  bool same_bits(const Array& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, size_ * sizeof(T)) == 0;
  }

 private:
  int64_t size_;
  T* data_;
};

using Random = std::mt19937;

inline double normal(Random& random) { return std::normal_distribution<double>()(random); }

inline int64_t integer(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Every fourth value is NaN, inf, -inf, 0 or -0.
template <class T>
T special_or_normal(Random& random) {
  const double specials[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0};
  const int64_t pick = integer(random, 0, 19);
  return rounded<T>(pick < 5 ? specials[pick] : normal(random));
}

// ---- units

enum class Split { whole, units, threads };

constexpr Split kSplits[] = {Split::whole, Split::units, Split::threads};

// Calls f(begin, end) for all units: in one call, in one call a unit (the last unit first), or on three threads.
template <class F>
void run_units(Split split, int64_t units, F&& f) {
  if (split == Split::whole) return f(0, units);
  if (split == Split::units) {
    for (int64_t unit = units - 1; unit >= 0; --unit) f(unit, unit + 1);
    return;
  }
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] { f(units * i / kThreads, units * (i + 1) / kThreads); });
  for (std::thread& thread : threads) thread.join();
}

// ---- comparisons

inline std::string text(double v) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.9g", v);
  return buffer;
}

inline void expect_value(bool holds, const char* name, int64_t i, double got, double exact, double allowed) {
  if (holds) return ++report().checks, void();
  expect(false, std::string(name) + "[" + std::to_string(i) + "] is " + text(got) + ", expected " + text(exact) +
                    " within " + text(allowed));
}

// Expects got to be within half a unit of `exact`, plus `rounding` epsilons of the arithmetic type at `magnitude`.
template <class T>
void expect_near(const char* name, int64_t i, T got, double exact, double magnitude, double rounding) {
  const double v = value(got), allowed = half_ulp<T>(exact) + rounding * kEpsilon<T> * magnitude + 1e-45;
  const bool holds = std::isfinite(exact) ? std::fabs(v - exact) <= allowed : v == exact || (v != v && exact != exact);
  expect_value(holds, name, i, v, exact, allowed);
}

// Expects numbers to be equal; NaN equals NaN.
template <class T>
void expect_equal(const char* name, int64_t i, T got, double exact) {
  const double v = value(got);
  expect_value(v == exact || (v != v && exact != exact), name, i, v, exact, 0);
}

inline void expect_byte(const char* name, int64_t i, int got, int exact) {
  expect_value(got == exact, name, i, got, exact, 0);
}

// Calls f(Type<T>{}) for the four element types.
template <class F>
void for_types(F&& f) {
  f(Type<double>{});
  f(Type<float>{});
  f(Type<bf16>{});
  f(Type<f16>{});
}

}  // namespace alexnet_ext::test
