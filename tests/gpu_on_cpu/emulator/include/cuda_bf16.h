// Conversion of fp32 to bf16 and back as in CUDA: to nearest, ties to even, and every NaN becomes the same NaN.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (v != v) return {0x7fff};
  const unsigned bits = __float_as_uint(v);
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
inline unsigned __heq2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  return mask_of_pair(a, b, __bfloat162float, [](float v, float w) { return v == w; });
}
inline unsigned __hgtu2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  return mask_of_pair(a, b, __bfloat162float, [](float v, float w) { return !(v <= w); });
}
// Of a NaN and a number, the number.
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto least = [](__nv_bfloat16 v, __nv_bfloat16 w) {
    return __float2bfloat16_rn(std::fmin(__bfloat162float(v), __bfloat162float(w)));
  };
  return {least(a.x, b.x), least(a.y, b.y)};
}
