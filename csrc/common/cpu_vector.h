// Vectors of the instruction set that this file is compiled for, and rows moved between memory and fp32 scratch.
//
// Everything here is in the namespace of the instruction set. Otherwise the linker could keep the AVX-512 copy of an
// inline function for an older CPU. For the same reason kernels use only such functions of std as are inlined for
// certain.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "types.h"

namespace alexnet_ext::ALEXNET_ISA {

#if defined(ALEXNET_VECTOR_BYTES)
constexpr int kVectorBytes = ALEXNET_VECTOR_BYTES;  // ALEXNET_EXT_NARROW: wide vectors made of narrower ones
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

// The integer as wide as A: the element type of a comparison of Vec<A>.
template <class A>
using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

template <class A>
inline Vec<A> sqrt(Vec<A> v) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Zeroed scratch memory. A vector of slack at its end lets loops over whole vectors go without a tail.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(allocate(size)) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return data_; }

 private:
  static A* allocate(int64_t size) {
    void* p = std::calloc(size + 64 / sizeof(A) + kLanes<A>, sizeof(A));
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<A*>(p);
  }
  A* data_;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float widen(bf16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }

// Moves exponent and fraction to their fp32 positions and rescales by 2^112, which also normalises subnormals.
inline float widen(f16 v) {
  uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  uint32_t sign = (v.bits & 0x8000u) << 16;
  uint32_t scaled = to_bits(from_bits(magnitude) * 0x1p112f);
  uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u | magnitude : scaled;
  return from_bits(special | sign);
}

template <class T>
inline T narrow(Acc<T> v);
template <>
inline float narrow<float>(float v) {
  return v;
}
template <>
inline double narrow<double>(double v) {
  return v;
}

template <>
inline bf16 narrow<bf16>(float v) {
  uint32_t bits = to_bits(v);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>(v != v ? nan : rounded)};
}

// Rounds to nearest even. Subnormals are rounded by adding a number whose last place is fp16's smallest step.
template <>
inline f16 narrow<f16>(float v) {
  uint32_t bits = to_bits(v);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t finite = magnitude < 0x38800000u ? small : normal;
  uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>((magnitude >= 0x47800000u ? large : finite) | sign)};
}

template <class T>
inline void load_row(Acc<T>* __restrict dst, const T* __restrict src, int64_t n) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    std::memcpy(dst, src, n * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
  }
}

template <class T>
inline void store_row(T* __restrict dst, const Acc<T>* __restrict src, int64_t n) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    std::memcpy(dst, src, n * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = narrow<T>(src[i]);
  }
}

// The place of row `row` of image n in memory: `pieces` runs of `length` elements, `step` apart. In NCHW each channel
// from `first` on has a run of `width` elements. In NHWC the row is one run of width * channels.
struct RowPlace {
  int64_t offset, pieces, length, step;
};

inline RowPlace row_place(const Images& s, int64_t n, int64_t first, int64_t channels, int64_t row) {
  if (s.channels_last) return {(n * s.height + row) * s.width * s.channels, 1, s.width * s.channels, 0};
  return {((n * s.channels + first) * s.height + row) * s.width, channels, s.width, s.height * s.width};
}

template <class T>
inline void load_row(Acc<T>* dst, const T* base, const RowPlace& at) {
  for (int64_t i = 0; i < at.pieces; ++i) load_row(dst + i * at.length, base + at.offset + i * at.step, at.length);
}

template <class T>
inline void store_row(T* base, const Acc<T>* src, const RowPlace& at) {
  for (int64_t i = 0; i < at.pieces; ++i) store_row(base + at.offset + i * at.step, src + i * at.length, at.length);
}

inline void load_row(uint8_t* dst, const uint8_t* base, const RowPlace& at) {
  for (int64_t i = 0; i < at.pieces; ++i) std::memcpy(dst + i * at.length, base + at.offset + i * at.step, at.length);
}

inline void store_row(uint8_t* base, const uint8_t* src, const RowPlace& at) {
  for (int64_t i = 0; i < at.pieces; ++i) std::memcpy(base + at.offset + i * at.step, src + i * at.length, at.length);
}

}  // namespace alexnet_ext::ALEXNET_ISA
