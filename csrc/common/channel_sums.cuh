// Sums over all pixels, for each channel, in one fixed order: the bias gradient.
//
// Each block writes its sums as a row of a [rows][channels] workspace, and a second kernel adds up the rows.
#pragma once

#include "channel_blocks.cuh"
#include "channel_sums.h"

namespace alexnet_ext {

// The workspace has the arithmetic type. A block takes kChannels neighbouring channels and a run of rows for each of
// its other threads, kRound rows at a time, so that their loads are in flight together.
template <class T, int kChannels, int kRound>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    sum_rows_kernel(int64_t rows, int64_t channels, const Acc<T>* __restrict__ sums, T* __restrict__ total) {
  constexpr int kRuns = kBlockThreads / kChannels;
  double* shared = shared_memory<double>();
  const int run = threadIdx.x / kChannels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x % kChannels;
  double sum = 0;
  if (channel < channels)
    for (int64_t row = run; row < rows; row += kRound * kRuns) {
      Acc<T> values[kRound];
#pragma unroll
      for (int i = 0; i < kRound; ++i)
        values[i] = row + i * kRuns < rows ? sums[(row + i * kRuns) * channels + channel] : Acc<T>(0);
#pragma unroll
      for (int i = 0; i < kRound; ++i) sum += values[i];
    }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (run != 0 || channel >= channels) return;
#pragma unroll
  for (int i = 1; i < kRuns; ++i) sum += shared[threadIdx.x + i * kChannels];
  total[channel] = narrow<T>(static_cast<Acc<T>>(sum));
}

// By default for a bias gradient, of few channels and up to some 528 rows, where the time of one block counts. A weight
// gradient has many channels and few rows.
template <class T, int kChannels = 8, int kRound = 9>
inline cudaError_t sum_rows(int64_t rows, int64_t channels, const void* sums, void* total, void* stream) {
  return launch(sum_rows_kernel<T, kChannels, kRound>, ceil_div(channels, kChannels), kBlockThreads * sizeof(double),
                stream, rows, channels, static_cast<const Acc<T>*>(sums), static_cast<T*>(total));
}

// ---- channels-last: a thread keeps V neighbouring channels

// Where value i of a thread is in shared memory. Of eight values, every second four threads swap the halves, so that no
// two of eight lanes that store 16 bytes hit one bank.
template <int V>
__device__ inline int sum_place(int thread, int i) {
  return V == 8 ? ((thread * 2 + i / 4) ^ (thread / 4 & 1)) * 4 + i % 4 : thread * V + i;
}

// Calls write(channel, total) for this block's sums. Owner i of the block is thread thread_of(i). It has summed vector
// (before + i) % vectors of every pixel that it took.
template <int V, class A, class ThreadOf, class Write>
__device__ inline void for_owned_sums(const A (&sum)[V], int vectors, int before, int owners, ThreadOf&& thread_of,
                                      Write&& write) {
  A* shared = shared_memory<A>();
  constexpr int kPart = V < 4 ? V : 4;
#pragma unroll
  for (int first = 0; first < V; first += kPart) {
    A part[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i] = sum[first + i];
    store<kPart>(shared + sum_place<V>(threadIdx.x, first), part);
  }
  __syncthreads();
  const int channels = vectors * V;
  for (int channel = threadIdx.x; channel < channels; channel += kBlockThreads) {
    const int vector = channel / V;
    A total = 0;
    for (int i = vector >= before ? vector - before : vector - before + vectors; i < owners; i += vectors)
      total += shared[sum_place<V>(thread_of(i), channel % V)];
    write(channel, total);
  }
}

// Writes them as this block's row.
template <int V, class A, class ThreadOf>
__device__ inline void sum_owners(const A (&sum)[V], int vectors, int before, int owners, ThreadOf&& thread_of,
                                  A* __restrict__ sums) {
  A* row = sums + static_cast<int64_t>(blockIdx.x) * vectors * V;
  for_owned_sums(sum, vectors, before, owners, thread_of, [&](int channel, A total) { row[channel] = total; });
}

// The same where the inner kOwners lanes of each warp walk all vectors in memory order. The step of the whole grid is a
// multiple of a pixel's vectors.
template <int V, int kOwners, class A>
__device__ inline void sum_vectors(const A (&sum)[V], const Divisor& vectors, A* __restrict__ sums) {
  constexpr int kBlockOwners = kBlockThreads / kWarp * kOwners, kOuter = (kWarp - kOwners) / 2;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlockOwners;
  const int before = static_cast<int>(start - vectors.divide(start) * vectors.value);
  sum_owners(
      sum, static_cast<int>(vectors.value), before, kBlockOwners,
      [](int i) { return i / kOwners * kWarp + kOuter + i % kOwners; }, sums);
}

// ---- a thread keeps one channel

// For kernels that take each element by itself.
constexpr ChannelWidths kElementWidths{1, 32};

// Writes this block's row: the sums of f(position, inside) over its pixels. Every thread of the block calls f equally
// often; inside is false past the last pixel. Null sums: nothing is written.
template <class A, class F>
__device__ inline void sum_pixels(const ChannelBlocks& work, const DeviceImages& s, A* __restrict__ sums, F&& f) {
  const ChannelPlace own(work);
  A sum = 0;
  for_pixels(work, [&](int64_t pixel, bool inside) { sum += f(s.position(pixel, own.channel), inside); });
  if (sums == nullptr) return;
  A* shared = shared_memory<A>();
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (own.pixel != 0 || own.channel >= s.channels) return;
  for (int i = 1; i < work.height; ++i) sum += shared[threadIdx.x + i * own.pixel_step];
  sums[own.row * s.channels + own.channel] = sum;
}

// The same for f(position), which is called for this block's elements alone.
template <class A, class F>
__device__ inline void sum_elements(const ChannelBlocks& work, const DeviceImages& s, A* __restrict__ sums, F&& f) {
  sum_pixels(work, s, sums,
             [&](const Position& at, bool inside) { return inside && at.channel < s.channels ? f(at) : A(0); });
}

}  // namespace alexnet_ext
