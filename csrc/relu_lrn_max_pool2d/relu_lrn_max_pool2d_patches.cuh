// The paper's block channels-last with LRN over five channels and windows of 3 x 3 at stride 2, as in AlexNet. A lane
// takes eight channels of a patch of 2 x 2 inputs: those of even and odd row and column.
#pragma once

#include "../common/lrn_pool_block.cuh"
#include "../local_response_norm/local_response_norm_pairs.cuh"

namespace alexnet_ext {

// Kernels with at most 128 registers a thread run two blocks at a time.
constexpr int kPatchBlocks = 2;

// Images as patches. Offsets count vectors of eight channels, in 32 bits.
struct Patches {
  int lanes, height, width, out_height, out_width;
  int down, across, count;  // patches of an image's sides, of all images
  int edge;                 // lanes on each side of a warp that only supply neighbours to the others
  Divisor by_lanes, by_across, by_down;

  explicit Patches(const LrnPoolBlock& p)
      : lanes(static_cast<int>(p.in.channels / kLaneChannels)),
        height(static_cast<int>(p.in.height)),
        width(static_cast<int>(p.in.width)),
        out_height(static_cast<int>(p.out.height)),
        out_width(static_cast<int>(p.out.width)),
        down((height + 1) / 2),
        across((width + 1) / 2),
        count(static_cast<int>(p.in.batch * down * across)),
        edge(kWarp % lanes == 0 ? 0 : 1),  // a warp that holds whole pixels needs no neighbours
        by_lanes(lanes),
        by_across(across),
        by_down(down) {}
};

// For a block that has_lanes.
inline bool has_patches(const LrnPoolBlock& p) {
  const Pooling& pool = p.pool;
  return pool.kernel[0] == 3 && pool.kernel[1] == 3 && pool.stride[0] == 2 && pool.stride[1] == 2 &&
         elements(p.in) <= int64_t{1} << 32;
}

// A vector of eight channels as it is in memory.
template <class T>
struct Vector {
  uint4 parts[kLaneChannels / kVector<T>];

  // Each word has these bits: a pair of elements, or one of fp32.
  __device__ static Vector filled(uint32_t bits) {
    Vector all;
#pragma unroll
    for (uint4& part : all.parts) part = {bits, bits, bits, bits};
    return all;
  }
};

template <class T>
__device__ inline Vector<T> vector_at(const T* from, int place) {
  return reinterpret_cast<const Vector<T>*>(from)[place];
}

// Less than any value: ReLU makes it 0, whatever the bias.
template <class T>
__device__ inline Vector<T> least() {
  return Vector<T>::filled(__is_same(T, float) ? 0xff800000 : __is_same(T, bf16) ? 0xff80ff80 : 0xfc00fc00);
}

template <class T>
__device__ inline void activate(float (&values)[kLaneChannels], const Vector<T>& x,
                                const float (&bias)[kLaneChannels]) {
  load<kLaneChannels>(values, reinterpret_cast<const T*>(&x));
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) values[i] = relu(values[i] + bias[i]);
}

// A window's gradients and winners. Where the window is outside the output, no tap has won it.
template <class T>
struct Won {
  Vector<T> gradient = Vector<T>::filled(0);
  uint2 taps{~0u, ~0u};

  __device__ Won(bool inside, int place, const T* __restrict__ dy, const uint8_t* __restrict__ winners) {
    if (!inside) return;
    gradient = vector_at(dy, place);
    taps = reinterpret_cast<const uint2*>(winners)[place];
  }

  // sum += the gradients that this tap won.
  __device__ void add_to(float (&sum)[kLaneChannels], int tap) const {
    float values[kLaneChannels];
    load<kLaneChannels>(values, reinterpret_cast<const T*>(&gradient));
    const uint32_t four = tap * 0x01010101u;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i)
      if ((((i < 4 ? taps.x : taps.y) ^ four) & 255u << 8 * (i % 4)) == 0) sum[i] += values[i];
  }
};

// The windows that a patch is in, those above and on the left first.
template <class T>
struct PatchWindows {
  Won<T> windows[4];

  __device__ PatchWindows(const Patches& p, int image, int row, int column, int group, const T* __restrict__ dy,
                          const uint8_t* __restrict__ winners)
      : PatchWindows(((image * p.out_height + row) * p.out_width + column) * p.lanes + group, p.out_width * p.lanes,
                     p.lanes, row > 0, row < p.out_height, column > 0, column < p.out_width, dy, winners) {}

  // The gradient of input i of the patch. Along a side, one of even index is tap 2 of the window before and tap 0 of
  // the next, one of odd index is tap 1 of the latter.
  __device__ void gather(float (&sum)[kLaneChannels], int i) const {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int r = i / 2 ? 1 : w / 2 ? 0 : 2, s = i % 2 ? 1 : w % 2 ? 0 : 2;
      if (w / 2 >= i / 2 && w % 2 >= i % 2) windows[w].add_to(sum, r * 3 + s);
    }
  }

 private:
  __device__ PatchWindows(int place, int row_step, int step, bool above, bool below, bool left, bool right,
                          const T* __restrict__ dy, const uint8_t* __restrict__ winners)
      : windows{{above && left, place - row_step - step, dy, winners},
                {above && right, place - row_step, dy, winners},
                {below && left, place - step, dy, winners},
                {below && right, place, dy, winners}} {}
};

// Bytes: x, dy and winners are read once, and dx is written once.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kPatchBlocks)
    relu_lrn_max_pool2d_patches_lanes_backward_kernel(DeviceLrn<float> lrn, Patches p, const T* __restrict__ dy,
                                                      const T* __restrict__ x, const T* __restrict__ bias,
                                                      const uint8_t* __restrict__ winners, T* __restrict__ dx,
                                                      float* __restrict__ sums) {
  constexpr int kWarps = kBlockThreads / kWarp;
  const int lane = threadIdx.x % kWarp, owners = kWarp - 2 * p.edge, vectors = p.count * p.lanes;
  const int block = static_cast<int>(blockIdx.x) * kWarps * owners,
            step = static_cast<int>(gridDim.x) * kWarps * owners;
  const int own = block + static_cast<int>(threadIdx.x) / kWarp * owners, v = own + lane - p.edge + p.lanes;
  // The first lane has no patch before it: its patch is -1. The step is a multiple of a pixel's lanes.
  const int after = p.by_lanes.divide(v), group = v - after * p.lanes, patch_step = p.by_lanes.divide(step);
  const bool first = group == 0, last = group == p.lanes - 1, owns = lane >= p.edge && lane < kWarp - p.edge;
  float add[kLaneChannels] = {}, total[kLaneChannels] = {};
  if (bias != nullptr) load<kLaneChannels>(add, bias + group * kLaneChannels);
  for (int start = own, patch = after - 1; start < vectors; start += step, patch += patch_step) {
    const bool valid = patch >= 0 && patch < p.count;
    const int at = valid ? patch : 0, line = p.by_across.divide(at), image = p.by_down.divide(line);
    const int row = line - image * p.down, column = at - line * p.across;
    const PatchWindows<T> windows(p, image, row, column, group, dy, winners);
    const int corner = ((image * p.height + row * 2) * p.width + column * 2) * p.lanes + group;
    bool inside[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) inside[i] = valid && row * 2 + i / 2 < p.height && column * 2 + i % 2 < p.width;
    const auto place = [&](int i) { return corner + (i / 2 * p.width + i % 2) * p.lanes; };
    const auto input = [&](int i) { return inside[i] ? vector_at(x, place(i)) : least<T>(); };
    Vector<T> next = input(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float values[kLaneChannels], gradient[kLaneChannels], out[kLaneChannels];
      activate(values, next, add);
      if (i < 3) next = input(i + 1);
      windows.gather(gradient, i);
      gradients_of_five(out, lrn, values, gradient, first, last);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        if (values[c] <= 0) out[c] = 0;
        total[c] += out[c];
      }
      if (owns && inside[i]) store<kLaneChannels>(dx + int64_t{place(i)} * kLaneChannels, out);
    }
  }
  sum_owners(
      total, p.lanes, block % p.lanes, kWarps * owners,
      [&](int i) { return p.edge ? i / kOwners * kWarp + 1 + i % kOwners : i; }, sums);
}

}  // namespace alexnet_ext
