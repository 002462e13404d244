// Local response normalization: parameters and launchers, free of PyTorch.
//
//   y_c  = x_c * s_c^-beta,   s_c = k + alpha/n * sum of x_j^2 for j in [c - n/2, c + (n-1)/2]
//   dx_i = dy_i * s_i^-beta - (2 alpha beta / n) * x_i * sum of dy_j x_j s_j^-(beta+1) for j in [i - (n-1)/2, i + n/2]
//
// Indices outside the channels count as zeros. The backward window mirrors the forward one; for even n they differ.
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

struct Lrn {
  int64_t size;
  double alpha, beta, k;
};

// x is batch x channels x pixels, each with a stride. y, dy and dx have the same strides.
struct LocalResponseNorm {
  DType dtype;
  Lrn lrn;
  int64_t batch, channels, pixels;
  int64_t batch_stride, channel_stride, pixel_stride;
};

// CPU units: tiles of this many pixels. A call takes the units [begin, end).
constexpr int64_t kLrnTile = 64;

inline int64_t local_response_norm_units(const LocalResponseNorm& p) { return p.batch * ceil_div(p.pixels, kLrnTile); }

template <Isa isa>
void local_response_norm_cpu(const LocalResponseNorm& p, const void* x, void* y, int64_t begin, int64_t end);

template <Isa isa>
void local_response_norm_backward_cpu(const LocalResponseNorm& p, const void* dy, const void* x, void* dx,
                                      int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); returns a cudaError_t.
int local_response_norm_cuda(const LocalResponseNorm& p, const void* x, void* y, void* stream);
int local_response_norm_backward_cuda(const LocalResponseNorm& p, const void* dy, const void* x, void* dx,
                                      void* stream);

}  // namespace alexnet_ext
