// Arguments and CPU bias sums of the blocks that fuse ReLU, LRN and max pooling, at the boundary, for both orders.
#pragma once

#include "../relu_lrn_max_pool2d/relu_lrn_max_pool2d.h"
#include "pooling.h"

namespace alexnet_ext {

inline LrnPoolBlock block_of(const Tensor& x, const Lrn& lrn, const IntList& kernel, const IntList& stride) {
  check(lrn.size > 0, "lrn_size must be greater than zero, got ", lrn.size);
  return {dtype_of(x, "x"), {}, {}, pooling_of(kernel, stride, {0, 0}, {1, 1}), lrn};
}

// The bias sums of each CPU unit, [units][channels] in the arithmetic type.
class BiasSums {
 public:
  explicit BiasSums(const LrnPoolBlock& p)
      : units_(band_count(p.in)), channels_(p.in.channels), wide_(p.dtype == DType::f64) {
    sums_.resize(units_ * channels_ * (wide_ ? sizeof(double) : sizeof(float)));
  }

  void* data() { return sums_.data(); }

  // The total of all units in x's dtype, added in their order in fp64.
  Tensor total(const Tensor& x) const {
    const int64_t size[] = {channels_};
    Tensor total = torch::stable::empty({size, 1}, ScalarType::Double, std::nullopt, x.device());
    double* out = static_cast<double*>(total.data_ptr());
    for (int64_t c = 0; c < channels_; ++c) {
      out[c] = 0;
      for (int64_t u = 0; u < units_; ++u) out[c] += at(u * channels_ + c);
    }
    return torch::stable::to(total, x.scalar_type());
  }

 private:
  double at(int64_t i) const {
    return wide_ ? reinterpret_cast<const double*>(sums_.data())[i] : reinterpret_cast<const float*>(sums_.data())[i];
  }

  int64_t units_, channels_;
  bool wide_;
  std::vector<unsigned char> sums_;
};

}  // namespace alexnet_ext
