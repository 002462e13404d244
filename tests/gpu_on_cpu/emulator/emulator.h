// Runs CUDA kernels on the CPU: one fiber a thread, block after block, so that the very kernel files that nvcc compiles
// can be tested, sanitizers included, where there is no GPU.
//
// A warp runs alone until all its lanes wait at a block's barrier or have ended, each lane alone until it meets the
// others of its warp. What a missing barrier leaves undefined hence differs between the orders of running, and a kernel
// that is right gives the same bits in all. Not shown: what the memory model lets happen between blocks, and speed.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

namespace emulator {

constexpr int kWarp = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

extern Dim gridDim, blockDim, blockIdx, threadIdx;

enum class Order { forward, reverse, random };
void set_order(Order order);
int64_t launches();  // so far

// Runs thread() for every thread of the grid. Throws std::runtime_error where threads of a block wait for each other
// at different barriers, or for one that has ended.
void run(Dim grid, Dim block, int64_t shared_bytes, const std::function<void()>& thread);

// The block's dynamic shared memory: exactly the bytes that the launch asked for, full of garbage at first.
void* shared_memory();

void wait_for_block(std::source_location site);

// Every lane of the warp gives a value and gets read(all lanes' values, its own lane).
uint64_t exchange(unsigned mask, uint64_t value, std::source_location site,
                  const std::function<uint64_t(const uint64_t*, int)>& read);

template <class T, class Source>
T exchange_values(unsigned mask, T value, std::source_location site, Source&& source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, site, [&](const uint64_t* values, int lane) {
    const int from = source(lane);
    return values[from >= 0 && from < kWarp ? from : lane];
  });
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator
