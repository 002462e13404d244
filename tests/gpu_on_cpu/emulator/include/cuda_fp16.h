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
