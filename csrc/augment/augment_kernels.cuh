// Augmentation on CUDA: a warp takes a row of y, and a thread writes 16 adjacent bytes of it at a time. Where the
// colours of a pixel and the pixels of a row are adjacent, it reads four pixels by aligned words, as a crop begins at
// any byte. So it does in images with subsampled chroma, where they are four bytes of Y and three of U and of V.
// Neighbouring threads read the same cache lines. Bytes: the crop of each image is read once, y is written once.
#pragma once

#include "../common/images.cuh"
#include "augment.h"

namespace alexnet_ext {

// Four pixels may begin this many bytes before a row, and with their last word end as many after it.
constexpr int kAround = 16;

// Augment as a kernel's argument, in the constant bank. Only the images and the random choices are in memory.
template <class A>
struct DeviceAugment {
  int size;
  int run, height;      // rows of y that a warp takes from one image, and all of an image
  Divisor by_runs;      // division by an image's runs
  int64_t down, right;  // the largest offsets
  int64_t image_step, row_step, column_step, colour_step;
  int64_t readable;  // the bytes from the first to the last of images; 0 where those of a row are not adjacent
  A mean[kColours], scale[kColours];
  AugmentInputs in;

  explicit DeviceAugment(const Augment& p, const AugmentInputs& inputs)
      : size(static_cast<int>(p.size)),
        run(p.out.channels == kColours ? 2 : 1),
        height(static_cast<int>(p.out.height)),
        by_runs(ceil_div(p.out.height, run)),
        down(p.height - p.size),
        right(p.width - p.size),
        image_step(p.image_step),
        row_step(p.row_step),
        column_step(p.column_step),
        colour_step(p.colour_step),
        readable(p.colour_step == 1 && p.column_step == kColours && p.row_step < INT32_MAX / (2 * kDepthBlock)
                     ? (p.out.batch - 1) * p.image_step + (p.height - 1) * p.row_step + p.width * kColours
                 : p.subsampled && p.column_step == 1 && p.row_step >= p.width
                     ? (p.out.batch - 1) * p.image_step + (p.height / 2 * 3 - 1) * p.row_step + p.width
                     : 0),
        in(inputs) {
    for (int c = 0; c < kColours; ++c) {
      mean[c] = static_cast<A>(p.mean[c]);
      scale[c] = static_cast<A>(p.scale[c]);
    }
  }
};

// The value of the colour `after` behind `colour`. The compiler does not know `colour`, and an array with such an index
// would be in local memory.
template <class V>
__device__ inline V colour_of(const V (&values)[kColours], int colour, int after = 0) {
  const V first = values[after % 3], second = values[(after + 1) % 3], third = values[(after + 2) % 3];
  return colour == 0 ? first : colour == 1 ? second : third;
}

// Byte i of a word. The number 2^23 + byte less 2^23 is two instructions; a shift, a mask and a conversion are three.
template <class A>
__device__ inline A number_of(uint32_t word, int i) {
  return static_cast<A>(__uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 + i)) - 0x1p23f);
}

// The lowest 32 bits of high:low >> bits, for fewer than 32 bits.
__device__ inline uint32_t shifted(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}

// Bytes at any address, read by aligned words.
struct WordReader {
  const uint32_t* words;
  int odd;

  __device__ explicit WordReader(const uint8_t* from) : odd(static_cast<int>(reinterpret_cast<uintptr_t>(from) % 4)) {
    words = reinterpret_cast<const uint32_t*>(from - odd);
  }

  // The 12 bytes of four adjacent pixels, from `offset` bytes after `from` on.
  __device__ void read(uint32_t (&pixels)[3], int offset) const {
    const int at = odd + offset, bits = at % 4U * 8;
    const uint32_t* from = words + (at >> 2);
#pragma unroll
    for (int i = 0; i < 3; ++i) pixels[i] = shifted(from[i], from[i + 1], bits);
  }
};

// Four pixels, the last one first.
__device__ inline void reverse(uint32_t (&pixels)[3]) {
  const uint32_t a = pixels[0], b = pixels[1], c = pixels[2];
  pixels[0] = __byte_perm(c, b, 0x6321);
  pixels[1] = __byte_perm(__byte_perm(b, c, 0x0043), a, 0x3710);
  pixels[2] = __byte_perm(b, a, 0x6541);
}

__device__ inline int64_t inside(int64_t offset, int64_t most) {
  return offset < 0 ? 0 : offset > most ? most : offset;
}

// The crop of one image: the pixel of its first row that is y's first, and the value added to each colour.
template <class A>
struct Crop {
  const uint8_t *image, *first;
  int64_t top, left;
  bool flip;
  A add[kColours];

  __device__ Crop(const DeviceAugment<A>& work, int64_t number) {
    top = inside(work.in.offsets[number * 2], work.down);
    left = inside(work.in.offsets[number * 2 + 1], work.right);
    flip = work.in.flips[number];
    image = work.in.images + number * work.image_step;
    first = image + top * work.row_step + (flip ? left + work.size - 1 : left) * work.column_step;
#pragma unroll
    for (int c = 0; c < kColours; ++c) add[c] = static_cast<A>(work.in.shifts[number * kColours + c]) - work.mean[c];
  }

  // The first of the four pixels of y that begin `offset` bytes into its row, as bytes from y's first pixel.
  __device__ int pixels_at(int offset) const { return flip ? -offset - 3 * kColours : offset; }

  // Whether the rows [begin, end) may be read by words: what is around them must be in the images too.
  template <bool kSubsampled>
  __device__ bool has_words(const DeviceAugment<A>& work, int begin, int end) const {
    if constexpr (kSubsampled) {  // the last V is after all other bytes of the rows
      const int64_t before = image - work.in.images;
      return before + (top + begin) * work.row_step + left >= kAround &&
             before + chroma_at(work, true, top + end - 1, left + work.size - 1) + kAround <= work.readable;
    }
    const int64_t at = first - work.in.images - (flip ? (work.size - 1) * kColours : 0);
    return at + begin * work.row_step >= kAround &&
           at + (end - 1) * work.row_step + work.size * kColours + kAround <= work.readable;
  }

  // The bytes from the image's first one to the U, or the V, of its pixel.
  __device__ static int64_t chroma_at(const DeviceAugment<A>& work, bool is_v, int64_t row, int64_t column) {
    const ChromaPlace at = chroma_place(work.down + work.size, work.right + work.size, is_v, row, column);
    return at.row * work.row_step + at.column * work.column_step;
  }

  // The address of one colour of y's pixel, and the step to the next column, in images of any strides.
  __device__ const uint8_t* at(const DeviceAugment<A>& work, int row, int column, int colour) const {
    return first + row * work.row_step + column * step(work) + colour * work.colour_step;
  }
  __device__ int64_t step(const DeviceAugment<A>& work) const { return flip ? -work.column_step : work.column_step; }
};

// Four bytes at any address, read by two aligned words.
__device__ inline uint32_t four_bytes(const uint8_t* from) {
  const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 4);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from - odd);
  return shifted(words[0], words[1], odd * 8);
}

// Four pixels of y's row, from this column on, of an image with subsampled chroma. They lie in two or three squares
// that share chroma. A pixel outside the crop may have any values.
struct SubsampledPixels {
  uint32_t luma = 0, us = 0, vs = 0;
  bool odd, flip;  // odd: the image's first pixel is the second one of its square

  template <class A>
  __device__ SubsampledPixels(const DeviceAugment<A>& work, const Crop<A>& crop, int row, int column, bool has_words)
      : flip(crop.flip) {
    const int64_t down = crop.top + row, x = crop.left + (flip ? work.size - 4 - column : column);
    odd = x & 1;
    const uint8_t* line = crop.image + down * work.row_step;
    if (has_words) {
      luma = four_bytes(line + x);
      us = four_bytes(crop.image + Crop<A>::chroma_at(work, false, down, x));
      vs = four_bytes(crop.image + Crop<A>::chroma_at(work, true, down, x));
      return;
    }
    const int64_t last = work.right + work.size - 1;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int64_t at = inside(x + m, last), square = inside(x + 2 * m, last);
      luma |= line[at * work.column_step] << 8 * m;
      us |= crop.image[Crop<A>::chroma_at(work, false, down, square)] << 8 * m;
      vs |= crop.image[Crop<A>::chroma_at(work, true, down, square)] << 8 * m;
    }
  }

  // Their bytes of one colour, in y's order.
  __device__ uint32_t colour(int colour) const {
    const int u[] = {kOfU[0], kOfU[1], kOfU[2]}, v[] = {kOfV[0], kOfV[1], kOfV[2]};
    const int of_u = colour_of(u, colour), of_v = colour_of(v, colour);
    int add[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) add[k] = chroma(us >> 8 * k & 255, vs >> 8 * k & 255, of_u, of_v);
    const int adds[] = {add[0], odd ? add[1] : add[0], add[1], odd ? add[2] : add[1]};
    uint32_t bytes = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) bytes |= static_cast<uint32_t>(colour_byte(luma >> 8 * m & 255, adds[m])) << 8 * m;
    return __byte_perm(bytes, 0, flip ? 0x0123 : 0x3210);
  }

  // Their bytes, pixel by pixel.
  __device__ void interleave(uint32_t (&pixels)[3]) const {
    const uint32_t red = colour(0), green = colour(1), blue = colour(2);
    pixels[0] = __byte_perm(__byte_perm(red, green, 0x1040), blue, 0x3410);
    pixels[1] = __byte_perm(__byte_perm(green, blue, 0x0051), __byte_perm(red, green, 0x0062), 0x5410);
    pixels[2] = __byte_perm(__byte_perm(red, green, 0x0073), blue, 0x7106);
  }
};

// Calls f(crop, image, first row, end of the rows) for this warp's runs of rows of y.
template <class A, class F>
__device__ inline void for_runs(const DeviceAugment<A>& work, int64_t runs, F&& f) {
  constexpr int kWarps = kBlockThreads / kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < runs; i += warps) {
    const int64_t image = work.by_runs.divide(i);
    const int first = static_cast<int>(i - image * work.by_runs.value) * work.run;
    f(Crop<A>(work, image), image, first, first + work.run < work.height ? first + work.run : work.height);
  }
}

// Rows have 3 * size values, so their first and last ones may share 16 bytes with other rows. A lane writes one of
// these.
template <class T, int V, bool kSubsampled>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    augment_rows_kernel(DeviceAugment<Acc<T>> work, int64_t runs, T* __restrict__ y) {
  using A = Acc<T>;
  const int length = work.size * kColours, lane = static_cast<int>(threadIdx.x % kWarp);
  for_runs(work, runs, [&](const Crop<A>& crop, int64_t image, int row, int end) {
    const bool has_words = crop.template has_words<kSubsampled>(work, row, end);
    const int64_t steps[] = {work.colour_step, work.colour_step, crop.step(work) - 2 * work.colour_step};
    const uint8_t* from = crop.at(work, row, 0, 0);
    T* to = y + (image * work.size + row) * length;
#pragma unroll 1
    for (; row < end; ++row, from += work.row_step, to += length) {
      const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(to) / sizeof(T) % V);
      const int head = odd == 0 ? 0 : V - odd < length ? V - odd : length, vectors = (length - head) / V;
      const WordReader words(from);
      T* vector = to + head + lane * V;
      for (int k = head + lane * V; k + V <= length; k += kWarp * V, vector += kWarp * V) {
        const int colour = k % kColours;
        uint32_t bytes[3] = {};
        if (kSubsampled || has_words) {
          if constexpr (kSubsampled) {
            SubsampledPixels(work, crop, row, k / kColours, has_words).interleave(bytes);
          } else {
            words.read(bytes, crop.pixels_at(k - colour));
            if (crop.flip) reverse(bytes);
          }
          bytes[0] = shifted(bytes[0], bytes[1], 8 * colour);
          bytes[1] = shifted(bytes[1], bytes[2], 8 * colour);
        } else {
          const uint8_t* byte = from + (k / kColours * crop.step(work) + colour * work.colour_step);
#pragma unroll
          for (int m = 0; m < V; byte += colour_of(steps, colour, m++)) bytes[m / 4] |= *byte << m % 4 * 8;
        }
        A add[kColours], scale[kColours], values[V];
#pragma unroll
        for (int c = 0; c < kColours; ++c) {
          add[c] = colour_of(crop.add, colour, c);
          scale[c] = colour_of(work.scale, colour, c);
        }
#pragma unroll
        for (int m = 0; m < V; ++m) values[m] = (number_of<A>(bytes[m / 4], m % 4) + add[m % 3]) * scale[m % 3];
        store<V>(vector, values);
      }
      if (lane >= length - vectors * V) continue;
      const int k = lane < head ? lane : lane + vectors * V;
      const int colour = k % kColours;
      A byte;
      if constexpr (kSubsampled)
        byte = SubsampledPixels(work, crop, row, k / kColours, has_words).colour(colour) & 255;
      else
        byte = from[k / kColours * crop.step(work) + colour * work.colour_step];
      to[k] = narrow<T>((byte + colour_of(crop.add, colour)) * colour_of(work.scale, colour));
    }
  });
}

// Space-to-depth: a thread's 16 bytes are of one pixel of y and of one colour, from one row of four pixels or two. Two
// rows with subsampled chroma take 80 registers, so that three blocks fit: with 64, ptxas spills on 10.0 and 12.0.
template <class T, int V, bool kSubsampled>
__global__ void __launch_bounds__(kBlockThreads, kSubsampled ? 3 : kBlocksPerProcessor)
    augment_blocks_kernel(DeviceAugment<Acc<T>> work, int64_t runs, T* __restrict__ y) {
  using A = Acc<T>;
  constexpr int B = kDepthBlock, kChannels = kColours * B * B;
  static_assert(B * B % V == 0 && (B % V == 0 || V % B == 0));
  for_runs(work, runs, [&](const Crop<A>& crop, int64_t image, int out_row, int) {
    const int top = out_row * B, bottom = top + B < work.size ? top + B : work.size;
    const bool has_words = crop.template has_words<kSubsampled>(work, top, bottom);
    const uint8_t* from = crop.at(work, top, 0, 0);
    const WordReader words(from);
    const int length = (work.size + B - 1) / B * kChannels, step = static_cast<int>(work.row_step);
    T* to = y + (image * work.height + out_row) * length;
    for (int k = static_cast<int>(threadIdx.x % kWarp) * V; k < length; k += kWarp * V) {
      const int left = k / kChannels * B, colour = k % kChannels / (B * B), row = k / B % B, column = left + k % B;
      uint32_t bytes[(V + B - 1) / B] = {};
#pragma unroll
      for (int r = 0; r * B < V; ++r) {
        const int down = top + row + r < bottom ? row + r : bottom - top - 1;
        if constexpr (kSubsampled) {
          bytes[r] = SubsampledPixels(work, crop, top + down, left, has_words).colour(colour) >> k % B * 8;
        } else if (has_words) {
          uint32_t pixels[3];
          words.read(pixels, crop.pixels_at(left * kColours) + colour + down * step);
          const uint32_t taps = __byte_perm(pixels[0], pixels[1], 0x0630);
          bytes[r] = __byte_perm(taps, pixels[2], crop.flip ? 0x0125 : 0x5210) >> k % B * 8;
        } else {
          const uint8_t* byte = from + (down * work.row_step + column * crop.step(work) + colour * work.colour_step);
#pragma unroll
          for (int m = 0; m < B && m < V; ++m, byte += crop.step(work))
            if (column + m < work.size) bytes[r] |= *byte << 8 * m;
        }
      }
      A values[V];
      const A add = colour_of(crop.add, colour), scale = colour_of(work.scale, colour);
#pragma unroll
      for (int m = 0; m < V; ++m) values[m] = (number_of<A>(bytes[m / B], m % B) + add) * scale;
      if (top + B > work.size || left + B > work.size) {
#pragma unroll
        for (int m = 0; m < V; ++m)
          if (top + row + m / B >= work.size || column + m % B >= work.size) values[m] = 0;
      }
      store<V>(to + k, values);
    }
  });
}

}  // namespace alexnet_ext
