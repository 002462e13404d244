// ReLU + max pooling: parameters and launchers, free of PyTorch.
//
//   y = max(0, max of x over the window); a NaN in the window makes y NaN
//   winner = the tap of the window (row * kernel width + column) that y came from, in one byte: the first of equal
//            values, the last NaN, or 255 if no value is positive and no gradient flows
//   dx = the sum of dy over the windows that this element won, gathered in one fixed order, without atomics
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

constexpr int64_t kMaxTaps = 225;
constexpr int kNoWinner = 255;

struct Pooling {
  // Each [height, width].
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// The pooled length of side i, by the rule of torch.nn.MaxPool2d. (pooled_size in alexnet_ext/ops/_checks.py is the
// same.)
inline int64_t pooled_length(int64_t side, const Pooling& pool, int i, bool ceil_mode) {
  int64_t reach = side + 2 * pool.padding[i] - pool.dilation[i] * (pool.kernel[i] - 1) - 1;
  if (ceil_mode) reach += pool.stride[i] - 1;
  if (reach < 0) return 0;
  int64_t length = reach / pool.stride[i] + 1;
  return ceil_mode && (length - 1) * pool.stride[i] >= side + pool.padding[i] ? length - 1 : length;
}

struct ReluMaxPool2d {
  DType dtype;
  Images in, out;  // the same batch, channels and layout
  Pooling pool;
};

// Images are cut into bands of rows. A small batch gets more bands, so that several cores have work for one image. The
// bands must not depend on the number of threads, or sums over bands would too.
inline int64_t band_rows(const Images& s) { return s.batch >= 16 ? s.height : 8; }

inline int64_t band_count(const Images& s) { return s.batch * ceil_div(s.height, band_rows(s)); }

struct Band {
  int64_t image, first, last;
};

inline Band band_of(const Images& s, int64_t unit) {
  int64_t rows = band_rows(s), bands = ceil_div(s.height, rows), first = unit % bands * rows;
  return {unit / bands, first, first + rows < s.height ? first + rows : s.height};
}

// NCHW planes in one unit, so that calls do not dominate the cost of small planes.
constexpr int64_t kPlanes = 16;

// CPU units: groups of NCHW planes, or bands of NHWC rows (of the output forward, of the input backward).
inline int64_t relu_max_pool2d_units(const Images& s) {
  return s.channels_last ? band_count(s) : s.batch * ceil_div(s.channels, kPlanes);
}

template <Isa isa>
void relu_max_pool2d_cpu(const ReluMaxPool2d& p, const void* x, void* y, uint8_t* winners, int64_t begin, int64_t end);

template <Isa isa>
void relu_max_pool2d_backward_cpu(const ReluMaxPool2d& p, const void* dy, const uint8_t* winners, void* dx,
                                  int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); returns a cudaError_t.
int relu_max_pool2d_cuda(const ReluMaxPool2d& p, const void* x, void* y, uint8_t* winners, void* stream);
int relu_max_pool2d_backward_cuda(const ReluMaxPool2d& p, const void* dy, const uint8_t* winners, void* dx,
                                  void* stream);

}  // namespace alexnet_ext
