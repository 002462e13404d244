// The paper's block over contiguous images: see patch_walk.cuh.
#pragma once

#include "../common/patch_walk.cuh"

namespace alexnet_ext {

constexpr int kWalkBlocks = 2;  // 128 registers

// Bytes: x is read once, except the patches on the right and below that a block shares with the next. These are
// normalized again.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kWalkBlocks)
    relu_lrn_max_pool2d_walk_kernel(DeviceLrn<float> lrn, PatchWalks p, const T* __restrict__ x,
                                    const T* __restrict__ bias, T* __restrict__ y, uint8_t* __restrict__ winners) {
  constexpr int kDelay = ValueWalk<5>::kDelay;
  const int step = p.height * p.width, out_step = p.out_height * p.out_width;
  const WalkedChannels block(p);
  const WalkedPatch patch(p, block.row * p.own + static_cast<int>(threadIdx.x), block.first);
  const bool pools = patch.window && static_cast<int>(threadIdx.x) < p.own;
  Channels<const T> from{x, patch.input - kDelay * step, step};
  Channels<T> to{y, patch.output, out_step};
  const Wanted wanted{p.channels, block.first, block.end};
  ValueWalk<5> walks[4];
  int turn = 0;
  for_runs<kRun, kDelay>(p.channels, block.first, block.end, [&](int c, auto whole) {
    float values[4][kRun];
    load_inputs(values, from, p.width, patch.inside, bias, wanted, c, whole);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i][j] = walks[i].push(lrn, relu(values[i][j]));
    if (!whole.value && c + kRun - kDelay <= block.first) return;
    const SharedInputs shared(shared_memory<float>(), turn++);
    shared.put(values);
    __syncthreads();
    if (!pools) return;
    const Best<float, kRun> best = shared.template pooled<false>(values, p.across);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (!wanted.result(whole, c + j - kDelay)) continue;
      *to.at() = narrow<T>(best.value[j]), winners[to.place] = static_cast<uint8_t>(best.tap[j]);
      to.next();
    }
  });
}

// Bytes: x, dy and winners are read once, and dx is written once.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kWalkBlocks)
    relu_lrn_max_pool2d_walk_backward_kernel(DeviceLrn<float> lrn, PatchWalks p, const T* __restrict__ dy,
                                             const T* __restrict__ x, const T* __restrict__ bias,
                                             const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                             float* __restrict__ sums) {
  constexpr int kDelay = GradientWalk<5>::kDelay;
  const int step = p.height * p.width, out_step = p.out_height * p.out_width, before = kBlockThreads - p.own;
  const WalkedChannels block(p);
  const Wanted wanted{p.channels, block.first, block.end};
  float* shared = shared_memory<float>();
  const SharedWindows windows(shared);
  WarpTotals totals(shared + SharedWindows::kBytes / sizeof(float), p);
  const bool owns = static_cast<int>(threadIdx.x) >= before;
  for (int run = block.row; run < p.runs; run += p.rows) {
    const WalkedPatch patch(p, run * p.own + static_cast<int>(threadIdx.x) - before, block.first);
    bool inside[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) inside[i] = owns && patch.inside[i];
    Channels<const T> from{x, patch.input - kDelay * step, step};
    Channels<const T> window{dy, patch.output - kDelay * out_step, out_step};
    GradientWalk<5> walks[4];
    for_runs<kRun, kDelay>(p.channels, block.first, block.end, [&](int c, auto whole) {
      float values[4][kRun], gradient[kRun];
      Bytes<kRun> taps = static_cast<Bytes<kRun>>(-1);  // no tap has won
      load_inputs(values, from, p.width, inside, bias, wanted, c, whole);
#pragma unroll
      for (int j = 0; j < kRun; ++j, window.next()) {
        const bool channel = wanted.channel(whole, c + j);
        gradient[j] = patch.window && channel ? widen(*window.at()) : 0.0f;
        if (patch.window && channel) taps ^= static_cast<Bytes<kRun>>(winners[window.place] ^ kNoWinner) << 8 * j;
      }
      windows.put(gradient, taps);
      float sum[kRun] = {};
      float gathered[2][2][kRun];
      windows.get(p.across).gather(gathered);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const bool result = wanted.result(whole, c + j - kDelay);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float out = walks[i].push(lrn, relu(values[i][j]), gathered[i / 2][i % 2][j],
                                          wanted.channel(whole, c + j - kDelay / 2));
          if (!result) continue;
          const float masked = inside[i] && !(walks[i].input() <= 0) ? out : 0.0f;
          if (inside[i]) dx[from.place + (j - kRun - kDelay) * step + patch_input(i, p.width)] = narrow<T>(masked);
          sum[j] += masked;
        }
      }
      if (whole.value || c - kDelay >= block.first) totals.add(p, c - kDelay - block.first, sum);
    });
  }
  totals.write(p, block, sums);
}

}  // namespace alexnet_ext
