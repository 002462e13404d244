// Checks, layout and allocation of local_response_norm for every device: any tensor of rank 3 or more becomes batch x
// channels x pixels.
#pragma once

#include "../common/tensor.h"
#include "local_response_norm.h"

namespace alexnet_ext {

// The parameters for a dense x. Nothing if its pixels do not have a single stride.
inline std::optional<LocalResponseNorm> plan_pixels(const Tensor& x, const Lrn& lrn) {
  LocalResponseNorm p{dtype_of(x, "x"), lrn, x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 0};
  // Takes the dimensions from the smallest stride up: H may vary faster than W.
  std::vector<int64_t> left;
  for (int64_t d = 2; d < x.dim(); ++d)
    if (x.size(d) > 1) left.push_back(d);
  while (!left.empty()) {
    size_t next = 0;
    for (size_t i = 1; i < left.size(); ++i)
      if (x.stride(left[i]) < x.stride(left[next])) next = i;
    int64_t d = left[next];
    if (p.pixels == 1) {
      p.pixel_stride = x.stride(d);
    } else if (x.stride(d) != p.pixel_stride * p.pixels) {
      return std::nullopt;
    }
    p.pixels *= x.size(d);
    left.erase(left.begin() + next);
  }
  if (p.pixels == 1) p.pixel_stride = p.channel_stride == 1 ? p.channels : 1;
  return p;
}

inline void check_lrn(const Tensor& x, const Lrn& lrn) {
  check(x.dim() >= 3, "x has ", x.dim(), " dimensions, expected 3 or more (N, C, ...)");
  check(lrn.size > 0, "size must be greater than zero, got ", lrn.size);
  dtype_of(x, "x");
}

// Allocates y in x's memory format and has launch(parameters, x, y) fill it. Copies x only if it is not dense.
template <class Launch>
inline Tensor on_pixels(const Tensor& x, const Lrn& lrn, Launch&& launch) {
  check_lrn(x, lrn);
  Tensor y = fresh_like(x);
  if (x.numel() == 0) return y;
  if (auto p = plan_pixels(y, lrn)) {
    launch(*p, with_strides_of(y, x), y);
    return y;
  }
  Tensor plain = torch::stable::contiguous(x);
  return torch::stable::copy_(y, on_pixels(plain, lrn, launch));
}

// Allocates dx in x's memory format and has launch(parameters, dy, x, dx) fill it.
template <class Launch>
inline Tensor on_pixels(const Tensor& dy, const Tensor& x, const Lrn& lrn, Launch&& launch) {
  check_lrn(x, lrn);
  check_like(dy, "dy", x);
  check_shape(dy, "dy", {x.sizes().begin(), x.sizes().end()});
  return on_pixels(x, lrn, [&](const LocalResponseNorm& p, const Tensor& in, Tensor& dx) {
    launch(p, with_strides_of(dx, dy), in, dx);
  });
}

}  // namespace alexnet_ext
