// 3 x 3 convolution of stride 1 on the CPU by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2015, section 4.1), free of PyTorch.
//
//   y = A' [(G g G') * (B' d B)] A    a tile of 2 x 2 results, from 4 x 4 inputs d and the 3 x 3 weight g
//
// Summed over the input channels, each of the 16 places of a tile is one product of matrices, [tiles, C] times [C, K].
// That is 16 multiplications a tile where the sum over taps takes 36. The gradients use the transposes of the same
// maps:
//
//   z = A dy A',   dd = B (U z) B'  (tiles overlap, and add),   dg = G' (sum over tiles of z * v) G
//   where v = B' d B and U = G g G'
//
// Everything is fp32 and NHWC. Matrices are stored as [16][groups][rows][channels of a group].
#pragma once

#include "../../common/isa.h"
#include "../../common/types.h"

namespace alexnet_ext {

constexpr int64_t kPlaces = 16;

struct Winograd {
  Images in, out;  // dense NHWC; the channels of a group are a multiple of kWholeVector
  int64_t groups, padding[2];
  int64_t tiles_h, tiles_w;  // of an image
  int64_t capacity;          // rows of a matrix; each row is a tile

  int64_t inputs() const { return in.channels / groups; }
  int64_t outputs() const { return out.channels / groups; }
};

constexpr int64_t kWholeVector = 16;  // floats in a vector of the widest instruction set

// The gradient of the input is summed for this many channels at a time. A padded 16 x 16 image of them is 32 KB.
constexpr int64_t kSummedChannels = 32;

inline int64_t channel_blocks(const Winograd& p) { return ceil_div(p.inputs(), kSummedChannels); }

// A weight with any strides, in the order output channels, input channels, rows, columns.
struct Weight3x3 {
  float* data;
  int64_t strides[4];
};

// Units are rows of tiles, counted from image `first`. The first tile of that image is row 0 of the matrix.
template <Isa isa>
void winograd_input_cpu(const Winograd& p, const float* x, float* v, int64_t first, int64_t begin, int64_t end);

// y = max(least, . + bias), NaN kept. Returns whether every value was finite before the maximum. If not, the caller
// must use another convolution, as Winograd's sums turn infinities into NaN.
template <Isa isa>
bool winograd_output_cpu(const Winograd& p, const float* m, const float* bias, float least, float* y, int64_t first,
                         int64_t begin, int64_t end);

template <Isa isa>
void winograd_output_transposed_cpu(const Winograd& p, const float* dy, float* z, int64_t first, int64_t begin,
                                    int64_t end);

// Units are blocks of channels, counted from image `first`. Returns whether all of dx is finite.
template <Isa isa>
bool winograd_input_transposed_cpu(const Winograd& p, const float* m, float* dx, int64_t first, int64_t begin,
                                   int64_t end);

// Units are output channels.
template <Isa isa>
void winograd_weight_cpu(const Winograd& p, const Weight3x3& weight, float* u, int64_t begin, int64_t end);

// Transforms the sum of the `parts` parts of du, added in order. Returns whether all of dweight is finite.
template <Isa isa>
bool winograd_weight_transposed_cpu(const Winograd& p, const float* du, int64_t parts, const Weight3x3& dweight,
                                    int64_t begin, int64_t end);

}  // namespace alexnet_ext
