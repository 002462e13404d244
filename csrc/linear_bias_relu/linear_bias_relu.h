// The linear layer with bias and ReLU for small batches, free of PyTorch: parameters, CPU kernels and CUDA launchers.
//
//   y = max(0, x w^T + bias),  dz = dy where !(y <= 0) else 0
//   dx = dz w,  dw = dz^T x,  dbias = sum of dz over the rows
//
// The weight dominates the cost: it is read once forward and once for dx, and dw is written once (151 MB each for 9216
// x 4096 in fp32). x and dz have a few dozen rows and stay in the caches. So each product keeps a block of the small
// matrix in L1 and streams the large one past it.
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

// x is rows x inputs, weight outputs x inputs, y rows x outputs, all dense.
struct LinearBiasRelu {
  DType dtype;
  int64_t rows, inputs, outputs;
};

// Fewer rows do not fill a register tile: forward computes a dot product for each value instead.
constexpr int64_t kFewRows = 8;

// Tiles read x and dz packed: transposed and widened to [inputs or outputs][padded_rows], the padding zero.
inline int64_t padded_rows(const LinearBiasRelu& p) { return ceil_div(p.rows, 16) * 16; }

// The sizes of CPU units: columns to pack, outputs forward, inputs for dx, outputs for dweight.
constexpr int64_t kPackRun = 64, kForwardOutputs = 12, kInputs = 512, kWeightOutputs = 48;

// packed = source^T; source is rows x columns.
template <Isa isa>
void pack_rows_cpu(const LinearBiasRelu& p, int64_t columns, const void* source, void* packed, int64_t begin,
                   int64_t end);

// Reads packed_x if rows >= kFewRows, else x.
template <Isa isa>
void linear_bias_relu_cpu(const LinearBiasRelu& p, const void* x, const void* packed_x, const void* weight,
                          const void* bias, void* y, int64_t begin, int64_t end);

template <Isa isa>
void linear_input_gradient_cpu(const LinearBiasRelu& p, const void* packed_dz, const void* weight, void* dx,
                               int64_t begin, int64_t end);

// dweight or dbias may be null.
template <Isa isa>
void linear_weight_gradient_cpu(const LinearBiasRelu& p, const void* dz, const void* x, void* dweight, void* dbias,
                                int64_t begin, int64_t end);

// CUDA: asynchronous on `stream` (a cudaStream_t); each returns a cudaError_t. The products are the caller's.

// A row is a pixel of channels-last images.
inline Images pixels_of(const LinearBiasRelu& p) { return {p.rows, p.outputs, 1, 1, true}; }

// With more rows their sums take a second launch: it has more blocks.
constexpr int64_t kMostColumnRows = 1024;

// y = max(0, y), NaN kept.
int linear_relu_cuda(const LinearBiasRelu& p, void* y, void* stream);

// dz from dy and y, and its sums over the rows. `sums` is a workspace of [sum_rows_of(pixels_of(p))][outputs] in fp32
// (fp64 for fp64). With sums and dbias null, dz alone is computed.
int linear_relu_mask_cuda(const LinearBiasRelu& p, const void* dy, const void* y, void* dz, void* sums, void* dbias,
                          void* stream);

}  // namespace alexnet_ext
