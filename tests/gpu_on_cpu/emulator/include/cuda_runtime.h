// The part of CUDA C++ that the kernels use, for g++. tests/gpu_on_cpu/emulator/emulator.h runs them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <source_location>

#include "../emulator.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;

// A barrier is known by the place of its call. Threads that wait at different barriers have diverged.
using CallSite = std::source_location;

inline void __syncthreads(CallSite site = CallSite::current()) { emulator::wait_for_block(site); }

inline void __syncwarp(unsigned mask = 0xffffffff, CallSite site = CallSite::current()) {
  emulator::exchange(mask, 0, site, [](const uint64_t*, int) { return uint64_t{0}; });
}

// A lane whose source is outside its warp keeps its own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, CallSite site = CallSite::current()) {
  return emulator::exchange_values(mask, value, site, [=](int lane) { return lane - static_cast<int>(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, CallSite site = CallSite::current()) {
  return emulator::exchange_values(mask, value, site, [=](int lane) { return lane + static_cast<int>(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, CallSite site = CallSite::current()) {
  return emulator::exchange_values(mask, value, site, [=](int lane) { return lane ^ bits; });
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
// Four of the eight bytes of b:a; each digit of `which` names one, the lowest first.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 32; i += 8) found |= static_cast<unsigned>(bytes >> (which >> i / 2 & 7) * 8 & 255) << i;
  return found;
}

// For pairs of 16-bit values: 0xffff in the half of each for which compare(a, b) holds.
template <class Pair, class Widen, class Compare>
unsigned mask_of_pair(Pair a, Pair b, Widen widen, Compare compare) {
  return (compare(widen(a.x), widen(b.x)) ? 0xffffu : 0u) | (compare(widen(a.y), widen(b.y)) ? 0xffff0000u : 0u);
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
using std::max;
using std::min;
using std::pow;
using std::sqrt;
