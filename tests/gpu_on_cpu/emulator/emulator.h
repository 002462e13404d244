// Runs CUDA kernels on the CPU, so that the kernel files that nvcc compiles can be tested without a GPU, also under
// sanitizers. Each thread is a fiber, and blocks run one after another.
//
// A warp runs alone until all its lanes have ended or wait at a barrier of the block. A lane runs alone until it
// exchanges values with its warp. So where a barrier is missing, results differ between the orders of running; a
// correct kernel gives the same bits in every order. Not shown are speed and the races that the memory model allows
// between blocks.
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
int64_t launches();  // the number of launches so far

// Runs thread() for every thread of the grid. Throws std::runtime_error if threads of a block wait at different
// barriers, or for a thread that has ended.
void run(Dim grid, Dim block, int64_t shared_bytes, const std::function<void()>& thread);

// The block's dynamic shared memory. It has exactly the size given to the launch, and is full of NaN at first.
void* shared_memory();

void wait_for_block(std::source_location site);

// Every lane of the warp gives a value, and gets read(values of all lanes, its own lane).
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
