// Training's augmentation of a batch of bytes, in one pass, free of PyTorch: crop, flip, shift of colour, normalize,
// cast and space-to-depth.
//
//   y[n, c, i, j] = (images[n, top + i, left + (flip ? size - 1 - j : j), c] + (shift[n, c] - mean[c])) * scale[c]
//
// in the arithmetic type, rounded once. The additions come before the product, so that no compiler can contract them
// and every kernel gives the same bits. With a block B above 1, y is then padded on the right and below to multiples of
// B, and rearranged as by F.pixel_unshuffle(y, B): channel c of pixel (i * B + r, j * B + s) becomes channel c * B * B
// + r * B + s of pixel (i, j).
//
// Images with subsampled chroma are I420, (N, 3 H / 2, W) of even H and W: H rows of luma Y, then the planes of U and
// V, H / 2 x W / 2 each, without gaps. Values are in JFIF's full range. A square of 2 x 2 pixels shares U and V. They
// are turned to bytes of R, G and B first (colour_byte), so that all else is as above.
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

constexpr int kColours = 3, kDepthBlock = 4;

// JFIF's R = Y + 1.402 (V - 128), G = Y - 0.344136 (U - 128) - 0.714136 (V - 128) and B = Y + 1.772 (U - 128), with 16
// bits behind the point: by integers every kernel gives the same bytes. These are libjpeg's numbers.
constexpr int kOfU[] = {0, -22554, 116130}, kOfV[] = {91881, -46802, 0};

// What U and V, 0 to 255, add to Y, rounded.
constexpr int chroma(int u, int v, int of_u, int of_v) { return (of_u * (u - 128) + of_v * (v - 128) + 32768) >> 16; }

constexpr int colour_byte(int luma, int chroma) {
  const int sum = luma + chroma;
  return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

struct Augment {
  DType dtype;  // of y
  int64_t height, width, size;
  bool subsampled;                                         // whether images are I420; they have no colour_step
  int64_t image_step, row_step, column_step, colour_step;  // strides of images, in any order
  Images out;                                              // channels-last
  double mean[kColours], scale[kColours];                  // mean in 0 to 255, scale = 1 / (255 std)
};

// The images, and the random choices for each: offsets [batch][2] (top, left), flips [batch], shifts [batch][3].
struct AugmentInputs {
  const uint8_t* images;
  const int64_t* offsets;
  const bool* flips;
  const float* shifts;
};

// The memory's row and column with the U of pixel (row, column), or its V.
struct ChromaPlace {
  int64_t row, column;
};
constexpr ChromaPlace chroma_place(int64_t height, int64_t width, bool is_v, int64_t row, int64_t column) {
  const int64_t line = (row >> 1) + (is_v ? height >> 1 : 0);  // of W / 2 values: two are a row
  return {height + (line >> 1), (line & 1) * (width >> 1) + (column >> 1)};
}

// CPU units: rows of y. Every crop must be inside its image.
inline int64_t augment_units(const Augment& p) { return p.out.batch * p.out.height; }

template <Isa isa>
void augment_cpu(const Augment& p, const AugmentInputs& in, void* y, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); returns a cudaError_t. A crop outside its image is moved inside, as
// the host cannot read the offsets without waiting for the device.
int augment_cuda(const Augment& p, const AugmentInputs& in, void* y, void* stream);

}  // namespace alexnet_ext
