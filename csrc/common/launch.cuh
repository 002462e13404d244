// What CUDA kernels share: arithmetic types on the device, and the one way to launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace alexnet_ext {

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ inline float widen(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T>
__device__ inline T narrow(Acc<T> v) {
  if constexpr (sizeof(T) != 2) {
    return v;
  } else if constexpr (__is_same(T, bf16)) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  } else {
    return {__half_as_ushort(__float2half_rn(v))};
  }
}

constexpr int kBlockThreads = 256;

// Launches kernel(arguments...) with at least `threads` threads in blocks of kBlockThreads. The grid is one-dimensional
// and capped, so kernels stride over their work with 64-bit indices. Returns the launch's cudaError_t.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), int64_t threads, void* stream, const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  int64_t blocks = ceil_div(threads, kBlockThreads);
  if (blocks == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kBlockThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace alexnet_ext
