// Conversion of fp32 to fp16 and back as in CUDA, by g++'s own half type.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline __half __float2half_rn(float v) { return {std::bit_cast<unsigned short>(static_cast<_Float16>(v))}; }
inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

struct __half2 {
  __half x, y;
};

inline unsigned __heq2_mask(__half2 a, __half2 b) {
  return mask_of_pair(a, b, __half2float, [](float v, float w) { return v == w; });
}
inline unsigned __hgtu2_mask(__half2 a, __half2 b) {
  return mask_of_pair(a, b, __half2float, [](float v, float w) { return !(v <= w); });
}
// Of a NaN and a number, the number.
inline __half2 __hmin2(__half2 a, __half2 b) {
  const auto least = [](__half v, __half w) { return __float2half_rn(std::fmin(__half2float(v), __half2float(w))); };
  return {least(a.x, b.x), least(a.y, b.y)};
}
