// Shared by all CUDA kernels: conversions to and from the arithmetic type, and the one way to launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

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

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;
// The least blocks on a multiprocessor, so that a thread may have 64 registers. Without this number ptxas spills a few
// registers to fit more blocks.
constexpr int kBlocksPerProcessor = 4;
// A larger grid is never needed: kernels stride over their work with 64-bit indices.
constexpr int64_t kMaxBlocks = 1 << 20;

// Enough blocks for `threads` threads, at most kMaxBlocks.
inline int64_t blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kBlockThreads);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// Launches kernel(arguments...) in blocks of `threads` and returns the launch's cudaError_t. 0 blocks: no launch.
template <class... Parameters, class... Arguments>
inline cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t shared_bytes,
                                 void* stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
#if defined(__CUDACC__)
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#else  // tests/gpu_on_cpu/emulator
  (void)stream;
  emulator::run({static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, shared_bytes,
                [&] { kernel(arguments...); });
  return cudaSuccess;
#endif
}

// The same in blocks of kBlockThreads.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, void* stream,
                          const Arguments&... arguments) {
  return launch_blocks(kernel, blocks, kBlockThreads, shared_bytes, stream, arguments...);
}

// The block's dynamic shared memory, in the size given to launch().
template <class T>
__device__ inline T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return static_cast<T*>(emulator::shared_memory());
#endif
}

// Calls f(i) for all i < n, spread over the threads of the grid.
template <class F>
__device__ inline void for_each(int64_t n, F&& f) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; i < n; i += threads) f(i);
}

}  // namespace alexnet_ext
