// Training's augmentation of a batch of bytes, in one pass, free of PyTorch: crop, flip, shift of colour, normalize,
// cast and space-to-depth.
//
//   y[n, c, i, j] = (images[n, top + i, left + (flip ? size - 1 - j : j), c] + (shift[n, c] - mean[c])) * scale[c]
//
// in the arithmetic type, rounded once. The additions come before the product, so that no compiler can contract them
// and every kernel gives the same bits. With a block B above 1, y is then padded on the right and below to multiples of
// B, and rearranged as by F.pixel_unshuffle(y, B): channel c of pixel (i * B + r, j * B + s) becomes channel c * B * B
// + r * B + s of pixel (i, j).
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

constexpr int kColours = 3, kDepthBlock = 4;

struct Augment {
  DType dtype;  // of y
  int64_t height, width, size;
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

// CPU units: rows of y. Every crop must be inside its image.
inline int64_t augment_units(const Augment& p) { return p.out.batch * p.out.height; }

template <Isa isa>
void augment_cpu(const Augment& p, const AugmentInputs& in, void* y, int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); returns a cudaError_t. A crop outside its image is moved inside, as
// the host cannot read the offsets without waiting for the device.
int augment_cuda(const Augment& p, const AugmentInputs& in, void* y, void* stream);

}  // namespace alexnet_ext
