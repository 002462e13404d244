// ReLU's gradient on the CPU, free of PyTorch: the first step backward of every op that ends in a ReLU.
#pragma once

#include "isa.h"
#include "types.h"

namespace alexnet_ext {

// CPU units: runs of this many elements.
constexpr int64_t kReluRun = 1 << 14;

inline int64_t relu_units(int64_t n) { return ceil_div(n, kReluRun); }

// dz = dy where y > 0 or y is NaN, else 0. dz may be dy.
template <Isa isa>
void relu_mask_cpu(DType dtype, const void* dy, const void* y, void* dz, int64_t n, int64_t begin, int64_t end);

}  // namespace alexnet_ext
