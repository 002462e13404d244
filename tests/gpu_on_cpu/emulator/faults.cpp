// A kernel with one fault or with none, to test what the emulator notices.
//
// It sums the 64 values of a block. `fault` chooses the fault by number; 0 is none.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace {

std::string failure;

void block_sum(int fault, const float* x, float* sum) {
  float* shared = static_cast<float*>(emulator::shared_memory());
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  shared[t] = x[fault == 2 ? t + 1 : t];  // 2: the last thread reads past the end
  if (fault != 1) __syncthreads();        // 1: no barrier between the threads' writes and reads
  if (fault == 3) {                       // 3: half of the threads wait at another barrier
    if (t < 32) __syncthreads();
  }
  if (fault == 4 && t == 0) return;  // 4: a thread ends before the others' barrier
  float value = shared[63 - t];
  if (fault == 5 && lane == 3) __syncwarp();  // 5: one lane of a warp waits alone
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (fault != 6) __syncthreads();  // 6: a warp overwrites values that the other has not read yet
  if (lane == 0) shared[t / 32] = value;
  __syncthreads();
  if (t == 0) *sum = shared[0] + shared[1];
  if (fault == 7) *sum = x[t];  // 7: all threads write one result
}

}  // namespace

// Returns "", or the emulator's error. x has 64 elements.
extern "C" __attribute__((visibility("default"))) const char* alexnet_emulator_fault(int fault, const float* x,
                                                                                     float* sum) {
  failure.clear();
  try {
    emulator::run({1}, {64}, 64 * sizeof(float), [&] { block_sum(fault, x, sum); });
  } catch (const std::runtime_error& error) {
    failure = error.what();
  }
  return failure.c_str();
}
