// Both fused blocks over contiguous images, with AlexNet's LRN and windows of 3 x 3 at stride 2: a thread walks along
// the channels of a patch of 2 x 2 inputs, in which a window begins. Neighbouring threads take neighbouring patches.
#pragma once

#include "lrn_pool_block.cuh"

namespace alexnet_ext {

constexpr int kRun = 4;  // channels whose loads are in flight together

// Whether the kernels apply. A block of threads holds a row of patches and at least as many more. 32 bits count the
// elements, and those of some channels before and after.
inline bool has_walks(const LrnPoolBlock& p) {
  return p.dtype != DType::f64 && p.lrn.size == 5 && has_fast_lrn(p.lrn) && !p.in.channels_last &&
         p.in.channels <= kMaxLaneSums && has_patches<LrnPoolBlock>(p) && p.in.width < kBlockThreads &&
         p.in.height < 1 << 16;
}

// What the blocks of a grid take: a run of patches of all images, and a chunk of their channels. The grid is
// [rows][chunks] blocks, and a row takes every rows-th run.
struct PatchWalks {
  int height, width, out_height, out_width;
  int across;               // patches of a row
  int channels, chunk = 0;  // of an image, of a block
  int own;                  // patches of a run; the other threads of a block share a row and a patch with another run
  int runs, rows;
  Places patches;
  Divisor by_chunks;

  // `slots`: blocks that run at a time.
  PatchWalks(const LrnPoolBlock& p, int64_t slots, int64_t most_rows = INT32_MAX)
      : height(static_cast<int>(p.in.height)),
        width(static_cast<int>(p.in.width)),
        out_height(static_cast<int>(p.out.height)),
        out_width(static_cast<int>(p.out.width)),
        across(static_cast<int>(alexnet_ext::patches(p, 1))),
        channels(static_cast<int>(p.in.channels)),
        own(kBlockThreads - across - 1),
        patches(Planes({p.in.batch, 1, p.in.height, p.in.width, false}, 1), alexnet_ext::patches(p, 0), across),
        by_chunks(1) {
    runs = static_cast<int>(ceil_div(patches.count, own));
    rows = static_cast<int>(runs < most_rows ? runs : most_rows);
    // The cheapest chunks. Eight channels around each are read again, and to begin costs about one more. The last
    // blocks run on a GPU that empties: a block's whole time if all began together, half of it else.
    constexpr int64_t kAround = 9, kLeast = 16, kMost = 512;
    double least = 0;
    int64_t chunks = 1;
    for (int64_t size = ceil_div(channels, kRun) * kRun; size > 0; size -= kRun) {
      if (size > kMost || (size < kLeast && chunk > 0)) continue;
      const int64_t count = ceil_div(channels, size), full = ceil_div(rows * count, slots);
      const double waves = static_cast<double>(rows * count) / static_cast<double>(slots);
      const double idle = static_cast<double>(full) - waves;
      const double cost = static_cast<double>(size + kAround) * (waves + (full > 2 ? idle / 2 : idle));
      if (chunk > 0 && cost >= least) continue;
      least = cost, chunk = static_cast<int>(size), chunks = count;
    }
    by_chunks = Divisor(chunks);
  }

  int64_t blocks() const { return rows * by_chunks.value; }
};

// A block's row of the grid and its channels.
struct WalkedChannels {
  int row, first, end;

  __device__ explicit WalkedChannels(const PatchWalks& p) {
    const int block = static_cast<int>(blockIdx.x);
    row = p.by_chunks.divide(block);
    first = (block - row * static_cast<int>(p.by_chunks.value)) * p.chunk;
    end = min(first + p.chunk, p.channels);
  }
};

// Patch i of all images; there may be no such patch. Where channel c of its first input and of its window is.
struct WalkedPatch {
  int row, column;
  bool valid, window;  // there is one; a window begins in it
  bool inside[4];      // which inputs the image has: input i is in row i / 2 and column i % 2
  int input, output;

  __device__ WalkedPatch(const PatchWalks& p, int i, int c) : valid(i >= 0 && i < static_cast<int>(p.patches.count)) {
    const Place at(p.patches, static_cast<uint32_t>(valid ? i : 0));
    row = at.row, column = at.column;
    window = valid && row < p.out_height && column < p.out_width;
    const bool right = 2 * column + 1 < p.width, below = 2 * row + 1 < p.height;
    inside[0] = valid, inside[1] = valid && right, inside[2] = valid && below, inside[3] = valid && right && below;
    const int plane = at.image * p.channels + c;
    input = (plane * p.height + 2 * row) * p.width + 2 * column;
    output = (plane * p.out_height + row) * p.out_width + column;
  }
};

// Where input i of a patch is, from its first one.
__device__ inline int patch_input(int i, int width) { return i / 2 * width + i % 2; }

// Channel c of the bias. Without one, -0: the sum is the value itself, -0 too.
template <class T>
__device__ inline float bias_at(const T* __restrict__ bias, bool wanted, int c) {
  return bias != nullptr && wanted ? widen(bias[c]) : -0.0f;
}

// values[i][j] = channel c + j of input i and its bias; 0 where there is none. Goes on to the next run.
template <class T, class Whole>
__device__ inline void load_inputs(float (&values)[4][kRun], Channels<const T>& from, int width,
                                   const bool (&inside)[4], const T* __restrict__ bias, const Wanted& wanted, int c,
                                   Whole whole) {
#pragma unroll
  for (int j = 0; j < kRun; ++j, from.next()) {
    const bool channel = wanted.channel(whole, c + j);
    const float add = bias_at(bias, channel, c + j);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      values[i][j] = inside[i] && channel ? widen(*from.at(patch_input(i, width))) + add : 0.0f;
  }
}

// The inputs of a block's patches, of kRun channels each, for the windows that begin in patches before.
class SharedInputs {
 public:
  // The second input of the second row is in no other patch's window. There are two buffers in turn, so that a block
  // need not wait until all have read.
  static constexpr int kInputs = 3;
  static constexpr int64_t kBytes = int64_t{2} * kInputs * kBlockThreads * kRun * sizeof(float);

  __device__ SharedInputs(float* shared, int turn)
      : own_(shared + (turn % 2 * kInputs * kBlockThreads + static_cast<int>(threadIdx.x)) * kRun) {}

  __device__ void put(const float (&values)[4][kRun]) const {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) store<kRun>(own_ + i * kBlockThreads * kRun, values[i]);
  }

  // The maximum of the window that begins in this thread's patch. The third row and column are the first ones of the
  // patches below and on the right.
  template <bool floor>
  __device__ Best<float, kRun> pooled(const float (&values)[4][kRun], int across) const {
    Best<float, kRun> best;
#pragma unroll
    for (int t = 0; t < 9; ++t) {
      const int below = t / 6, right = t % 3 / 2, i = t / 3 % 2 * 2 + t % 3 % 2;
      if (below + right == 0) {
        best.template take<floor>(values[i], t);
      } else {
        float beside[kRun];
        load<kRun>(beside, own_ + (i * kBlockThreads + below * across + right) * kRun);
        best.template take<floor>(beside, t);
      }
    }
    return best;
  }

 private:
  float* own_;
};

// The gradients and winners of a block's windows, of kRun channels each, for the patches that they reach.
class SharedWindows {
 public:
  static constexpr int64_t kBytes = kBlockThreads * (sizeof(Raw<float, kRun>) + sizeof(Bytes<kRun>));

  __device__ explicit SharedWindows(void* shared)
      : gradients_(static_cast<Raw<float, kRun>*>(shared)),
        winners_(reinterpret_cast<Bytes<kRun>*>(gradients_ + kBlockThreads)) {}

  // Begins when all have read what was there, and ends when all have put theirs. (A second buffer would spare a
  // barrier, but the paper's block has no register left for it.)
  __device__ void put(const float (&gradient)[kRun], Bytes<kRun> won) const {
    __syncthreads();
    store<kRun>(reinterpret_cast<float*>(gradients_ + threadIdx.x), gradient);
    winners_[threadIdx.x] = won;
    __syncthreads();
  }

  // The windows that reach this thread's patch. Where there is none before it, the thread before has none.
  __device__ Patch<float, kRun> get(int across) const {
    Patch<float, kRun> patch;
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        // The first threads, whose patches are the block's before, go on at the block's end.
        const int from = static_cast<int>(threadIdx.x + kBlockThreads - (1 - a) * across - (1 - b)) % kBlockThreads;
        patch.gradients[a][b] = gradients_[from], patch.won[a][b] = winners_[from];
      }
    return patch;
  }

 private:
  Raw<float, kRun>* gradients_;
  Bytes<kRun>* winners_;
};

// ---- sums of each channel

// The sums of kCount values over a warp. Value i's is returned to the lanes of the i-th part of the warp.
template <int kCount>
__device__ inline float sum_warp(float (&values)[kCount]) {
  int step = kWarp / 2;
#pragma unroll
  for (int count = kCount; count > 1; count /= 2, step /= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float kept = upper ? values[i + count / 2] : values[i], sent = upper ? values[i] : values[i + count / 2];
      values[i] = kept + __shfl_xor_sync(0xffffffff, sent, step);
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) values[0] += __shfl_xor_sync(0xffffffff, values[0], step);
  return values[0];
}

// A block's sums of its channels, for each warp, in shared memory.
class WarpTotals {
 public:
  static int64_t shared_bytes(const PatchWalks& p) { return kWarps * p.chunk * sizeof(float); }

  __device__ WarpTotals(float* shared, const PatchWalks& p) : all_(shared) {
    for (int i = threadIdx.x; i < kWarps * p.chunk; i += kBlockThreads) all_[i] = 0;
    __syncthreads();
  }

  // Adds each lane's values of the chunk's channels from `at` on; 0 for those past its end.
  template <int kCount>
  __device__ void add(const PatchWalks& p, int at, float (&values)[kCount]) {
    constexpr int kLanes = kWarp / kCount;
    const int lane = threadIdx.x % kWarp, channel = at + lane / kLanes;
    const float sum = sum_warp(values);
    if (lane % kLanes == 0 && channel < p.chunk) all_[threadIdx.x / kWarp * p.chunk + channel] += sum;
  }

  // Writes the block's part of its row of sums.
  __device__ void write(const PatchWalks& p, const WalkedChannels& block, float* __restrict__ sums) const {
    __syncthreads();
    for (int channel = block.first + static_cast<int>(threadIdx.x); channel < block.end; channel += kBlockThreads) {
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += all_[warp * p.chunk + channel - block.first];
      sums[static_cast<int64_t>(block.row) * p.channels + channel] = sum;
    }
  }

 private:
  static constexpr int kWarps = kBlockThreads / kWarp;

  float* all_;
};

}  // namespace alexnet_ext
