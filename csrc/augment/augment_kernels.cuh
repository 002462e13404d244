// Augmentation on CUDA: a thread writes 16 adjacent bytes of y and gathers their bytes from the image. Neighbouring
// threads read the same cache lines. Bytes: the crop of each image is read once, y is written once.
#pragma once

#include "../common/images.cuh"
#include "augment.h"

namespace alexnet_ext {

// Augment as a kernel's argument, in the constant bank. Only the images and the random choices are in memory.
template <class A>
struct DeviceAugment {
  int size;
  int64_t down, right;  // the largest offsets
  int64_t image_step, row_step, column_step, colour_step;
  A mean[kColours], scale[kColours];
  AugmentInputs in;

  explicit DeviceAugment(const Augment& p, const AugmentInputs& inputs)
      : size(static_cast<int>(p.size)),
        down(p.height - p.size),
        right(p.width - p.size),
        image_step(p.image_step),
        row_step(p.row_step),
        column_step(p.column_step),
        colour_step(p.colour_step),
        in(inputs) {
    for (int c = 0; c < kColours; ++c) {
      mean[c] = static_cast<A>(p.mean[c]);
      scale[c] = static_cast<A>(p.scale[c]);
    }
  }
};

// The crop of one image: its first pixel, the step between columns, and the value added to each colour.
template <class A>
struct Crop {
  const uint8_t* first;
  int64_t column_step;
  A add[kColours];

  __device__ Crop(const DeviceAugment<A>& work, int64_t image) {
    const int64_t top = inside(work.in.offsets[image * 2], work.down);
    int64_t left = inside(work.in.offsets[image * 2 + 1], work.right);
    const bool flip = work.in.flips[image];
    if (flip) left += work.size - 1;
    first = work.in.images + image * work.image_step + top * work.row_step + left * work.column_step;
    column_step = flip ? -work.column_step : work.column_step;
#pragma unroll
    for (int c = 0; c < kColours; ++c) add[c] = static_cast<A>(work.in.shifts[image * kColours + c]) - work.mean[c];
  }

  // The value of colour c. The compiler does not know c, and an array with such an index would be in local memory.
  __device__ A value(const DeviceAugment<A>& work, int row, int column, int c) const {
    const uint8_t byte = first[row * work.row_step + column * column_step + c * work.colour_step];
    const A shift = c == 0 ? add[0] : c == 1 ? add[1] : add[2];
    const A scale = c == 0 ? work.scale[0] : c == 1 ? work.scale[1] : work.scale[2];
    return (static_cast<A>(byte) + shift) * scale;
  }

 private:
  __device__ static int64_t inside(int64_t offset, int64_t most) {
    return offset < 0 ? 0 : offset > most ? most : offset;
  }
};

// Rows of y have 3 * size values, so a thread's 16 bytes may begin in one row and end in the next, or in the next
// image.
template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    augment_rows_kernel(DeviceAugment<Acc<T>> work, DeviceImages out, int64_t n, T* __restrict__ y) {
  for_each((n + V - 1) / V, [&](int64_t v) {
    Acc<T> values[V];
    const int count = n - v * V < V ? static_cast<int>(n - v * V) : V;
    for (int done = 0; done < count;) {
      const Position at = out.position(v * V + done);
      const Crop<Acc<T>> crop(work, at.image);
      // Past the end of the row there may be no image to read.
      const int place = at.column * kColours + at.channel, left = work.size * kColours - place;
#pragma unroll
      for (int m = 0; m < V; ++m) {
        const int k = place + m - done;
        if (m >= done && m - done < left && m < count) values[m] = crop.value(work, at.row, k / kColours, k % kColours);
      }
      done += left;
    }
    if (count == V) {
      store<V>(y + v * V, values);
    } else {
#pragma unroll
      for (int m = 0; m < V; ++m)
        if (m < count) y[v * V + m] = narrow<T>(values[m]);
    }
  });
}

// Space-to-depth: a thread's 16 bytes are of one pixel of y and of one colour.
template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    augment_blocks_kernel(DeviceAugment<Acc<T>> work, DeviceImages out, int64_t n, T* __restrict__ y) {
  constexpr int B = kDepthBlock;
  static_assert(B * B % V == 0);
  for_each(n / V, [&](int64_t v) {
    Acc<T> values[V];
    const Position at = out.position(v * V);
    const Crop<Acc<T>> crop(work, at.image);
#pragma unroll
    for (int m = 0; m < V; ++m) {
      const int tap = at.channel % (B * B) + m, row = at.row * B + tap / B, column = at.column * B + tap % B;
      const bool padding = row >= work.size || column >= work.size;
      values[m] = padding ? Acc<T>(0) : crop.value(work, row, column, at.channel / (B * B));
    }
    store<V>(y + v * V, values);
  });
}

}  // namespace alexnet_ext
