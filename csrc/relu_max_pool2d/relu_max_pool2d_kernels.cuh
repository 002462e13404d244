// ReLU + max pooling on CUDA: a thread computes V neighbouring channels of one output (forward), of one input or of a
// patch of inputs (backward).
//
// Bytes: forward reads x from memory once, as overlapping windows find it in L1 and L2, and writes y and one byte a
// value. Backward reads dy and winners in the same way, writes dx once, and adds in one fixed order. In bf16 and with
// windows of 3 x 3 a warp takes 278 instructions for 256 outputs, and 403 for 1,024 inputs (compute capability 9.0).
#pragma once

#include "relu_max_pool2d_window.cuh"

namespace alexnet_ext {

// ---- windows of 3 x 3

// A thread that takes single elements takes those at one place of several images, as to find the place takes more
// instructions than its window.
template <int V>
constexpr int kTogether = V == 1 ? 8 : 1;

// Calls f(image) for the images that a thread takes for the place.
template <int V, class F>
__device__ inline void for_images(const Planes& s, const Place& at, F&& f) {
#pragma unroll 1
  for (int i = 0; i < kTogether<V>; ++i)
    if (at.image * kTogether<V> + i < s.images) f(at.image * kTogether<V> + i);
}

// kInside: every window is wholly inside its image, so that its taps are at constant places.
// With five blocks on a multiprocessor AlexNet's 13 x 13 images at batch 128 are in flight at once: 576 blocks of 660.
template <class T, int V, bool kInside>
__global__ void __launch_bounds__(kBlockThreads, 5)
    relu_max_pool2d_planes_kernel(Places work, Planes in, Planes out, Step stride, Step padding,
                                  const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ winners) {
  const uint32_t i = blockIdx.x * kBlockThreads + threadIdx.x;
  if (i >= work.count) return;
  if (V == 1) in.lanes = out.lanes = 1;  // known to the compiler
  const Place at(work, i);
  const NineTaps window(in, Place(0, at.row, at.column, at.lane), stride, padding);
  const int place = out.at(0, at.row, at.column, at.lane);
  for_images<V>(in, at, [&](int image) {
    const auto* vectors = reinterpret_cast<const Raw<T, V>*>(x) + image * in.step();
    Raw<T, V> taps[9];
#pragma unroll
    for (int t = 0; t < 9; ++t)
      taps[t] = kInside ? (vectors + window.place[0] + t / 3 * in.width)[t % 3] : vectors[window.place[t]];
    Largest<T, V> best(taps[0]);
#pragma unroll
    for (int t = 0; t < 9; ++t) best.take(taps[t], kInside ? t : window.number[t]);
    const int64_t to = static_cast<int64_t>(image * out.step() + place) * V;
    best.store(y + to, winners + to);
  });
}

// With a stride of 2, a thread takes a patch of 2 x 2 inputs: it reads the four windows that reach it once for nine
// uses.
template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, 5)
    relu_max_pool2d_patches_backward_kernel(Places work, Planes in, Planes out, Step padding, const T* __restrict__ dy,
                                            const uint8_t* __restrict__ winners, T* __restrict__ dx) {
  const uint32_t i = blockIdx.x * kBlockThreads + threadIdx.x;
  if (i >= work.count) return;
  if (V == 1) in.lanes = out.lanes = 1;
  const Place at(work, i), first(0, at.row, at.column, at.lane);
  const int top = at.row * 2 - padding.rows, left = at.column * 2 - padding.columns;
  const int place = in.at(0, top, left, at.lane);
  for_images<V>(in, at, [&](int image) {
    const int64_t from = static_cast<int64_t>(image * out.step()) * V;
    const Patch<T, V> patch(out, first, dy + from, winners + from);
    Acc<T> sum[2][2][V];
    patch.gather(sum);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s)
        if (in.has(top + r, left + s))
          store<V>(dx + static_cast<int64_t>(image * in.step() + place + (r * in.width + s) * in.lanes) * V, sum[r][s]);
  });
}

// ---- any window

template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_kernel(DevicePooling pool, DeviceImages in, DeviceImages out, int64_t n, const T* __restrict__ x,
                           T* __restrict__ y, uint8_t* __restrict__ winners) {
  for_each(n / V, [&](int64_t i) {
    const Position at = out.position(i * V);
    const T* from = x + in.at(at.image, at.channel, 0, 0);
    Best<Acc<T>, V> best;
    for_taps<0>(pool, in, at.row, at.column, [&](int ih, int iw, int tap) {
      Acc<T> values[V];
      load<V>(values, from + ih * in.row_step + iw * in.column_step);
      best.template take<true>(values, tap);
    });
    store<V>(y + i * V, best.value);
    store_bytes<V>(winners + i * V, best.tap);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    relu_max_pool2d_backward_kernel(DevicePooling pool, DeviceImages in, DeviceImages out, int64_t n,
                                    const T* __restrict__ dy, const uint8_t* __restrict__ winners, T* __restrict__ dx) {
  for_each(n / V, [&](int64_t i) {
    Acc<T> sum[V];
    gather<V>(sum, pool, out, in.position(i * V), dy, winners);
    store<V>(dx + i * V, sum);
  });
}

}  // namespace alexnet_ext
