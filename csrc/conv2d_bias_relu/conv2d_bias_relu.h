// ReLU behind a convolution, free of PyTorch: in place forward, folded into the gradient backward.
#pragma once

#include "../common/isa.h"
#include "../common/types.h"

namespace alexnet_ext {

// CPU units: runs of this many elements.
constexpr int64_t kReluRun = 1 << 14;

// y = max(0, y), NaN kept.
template <Isa isa>
void relu_inplace_cpu(DType dtype, void* y, int64_t n, int64_t begin, int64_t end);

// dz = dy where y > 0 or y is NaN, else 0. dz may be dy.
template <Isa isa>
void relu_mask_cpu(DType dtype, const void* dy, const void* y, void* dz, int64_t n, int64_t begin, int64_t end);

}  // namespace alexnet_ext
