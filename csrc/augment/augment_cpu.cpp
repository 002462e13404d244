// Augmentation on the CPU, a row of y at a time. The bytes are first brought into y's order; one vectorized loop then
// normalizes them. Bytes: the crop of each image is read once, y is written once.
#include "../common/cpu_vector.h"
#include "augment.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

// The index in a row of y of colour c of the pixel in column j, r rows down.
template <int B>
inline int64_t place(int64_t j, int64_t r, int64_t c) {
  return j / B * (kColours * B * B) + c * (B * B) + r * B + j % B;
}

template <int B>
void arrange(uint8_t* __restrict to, const uint8_t* from, int64_t rows, int64_t columns, int64_t row_step,
             int64_t column_step, int64_t colour_step) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t c = 0; c < kColours; ++c)
        to[place<B>(j, r, c)] = from[r * row_step + j * column_step + c * colour_step];
}

// `rows` rows of a crop with subsampled chroma, from pixel (top, column) on, as planes of colours [rows][3][2 * pairs].
// The column is even.
void to_colours(uint8_t* __restrict to, const Augment& p, const uint8_t* image, int64_t top, int64_t column,
                int64_t rows, int64_t pairs, int64_t column_step) {
  const auto place = [&](bool is_v, int64_t row) {
    const ChromaPlace at = chroma_place(p.height, p.width, is_v, row, column);
    return image + at.row * p.row_step + at.column * column_step;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* luma = image + (top + r) * p.row_step + column * column_step;
    const uint8_t *us = place(false, top + r), *vs = place(true, top + r);
    for (int c = 0; c < kColours; ++c, to += 2 * pairs)
      for (int64_t k = 0; k < pairs; ++k) {
        const int add = chroma(us[k * column_step], vs[k * column_step], kOfU[c], kOfV[c]);
        to[2 * k] = static_cast<uint8_t>(colour_byte(luma[2 * k * column_step], add));
        to[2 * k + 1] = static_cast<uint8_t>(colour_byte(luma[(2 * k + 1) * column_step], add));
      }
  }
}

template <class T>
void normalize(T* __restrict y, const uint8_t* __restrict bytes, const Acc<T>* __restrict add,
               const Acc<T>* __restrict scale, int64_t n) {
  for (int64_t k = 0; k < n; ++k) y[k] = narrow<T>((static_cast<Acc<T>>(bytes[k]) + add[k]) * scale[k]);
}

template <class T, int B>
void augment_rows(const Augment& p, const AugmentInputs& in, T* y, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t length = p.out.width * p.out.channels, padded = p.out.width * B;
  Buffer<A> add(length), scale(length);
  Buffer<uint8_t> bytes(length), planes(p.subsampled ? B * kColours * (p.size + 2) : 0);
  const auto colour = [](int64_t k) { return k % (kColours * B * B) / (B * B); };
  for (int64_t k = 0; k < length; ++k) scale[k] = static_cast<A>(p.scale[colour(k)]);
  for (int64_t unit = begin, image = -1; unit < end; ++unit) {
    const int64_t first = unit % p.out.height * B, rows = p.size - first < B ? p.size - first : B;
    if (unit / p.out.height != image) {
      image = unit / p.out.height;
      A shift[kColours];
      for (int c = 0; c < kColours; ++c)
        shift[c] = static_cast<A>(in.shifts[image * kColours + c]) - static_cast<A>(p.mean[c]);
      for (int64_t k = 0; k < length; ++k) add[k] = shift[colour(k)];
    }
    const int64_t top = in.offsets[image * 2] + first, start = in.offsets[image * 2 + 1];
    const int64_t left = start + (in.flips[image] ? p.size - 1 : 0);
    const uint8_t* whole = in.images + image * p.image_step;
    const uint8_t* from = whole + top * p.row_step + left * p.column_step;
    T* row = y + unit * length;
    if (B == 1 && !in.flips[image] && p.colour_step == 1 && p.column_step == kColours) {
      normalize(row, from, add, scale, length);
      continue;
    }
    const int64_t column_step = in.flips[image] ? -p.column_step : p.column_step;
    if (p.subsampled) {
      const int64_t even = start / 2 * 2, pairs = (start + p.size - even + 1) / 2;
      if (p.column_step == 1)
        to_colours(planes, p, whole, top, even, rows, pairs, 1);
      else
        to_colours(planes, p, whole, top, even, rows, pairs, p.column_step);
      const int64_t plane = 2 * pairs, across = in.flips[image] ? -1 : 1;
      arrange<B>(bytes, planes + (left - even), rows, p.size, kColours * plane, across, plane);
    } else if (p.colour_step == 1) {
      arrange<B>(bytes, from, rows, p.size, p.row_step, column_step, 1);
    } else {
      arrange<B>(bytes, from, rows, p.size, p.row_step, column_step, p.colour_step);
    }
    normalize<T>(row, bytes, add, scale, length);
    for (int64_t r = 0; r < B; ++r)
      for (int64_t j = r < rows ? p.size : 0; j < padded; ++j)
        for (int64_t c = 0; c < kColours; ++c) row[place<B>(j, r, c)] = T{};
  }
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void augment_cpu<Isa::ALEXNET_ISA>(const Augment& p, const AugmentInputs& in, void* y, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.out.channels == kColours)
      augment_rows<T, 1>(p, in, static_cast<T*>(y), begin, end);
    else
      augment_rows<T, kDepthBlock>(p, in, static_cast<T*>(y), begin, end);
  });
}

}  // namespace alexnet_ext
