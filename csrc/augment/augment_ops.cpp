// augment as a PyTorch operator on the CPU.
#include <torch/csrc/stable/library.h>

#include "augment_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& images, const Tensor& offsets, const Tensor& flips, const Tensor& shifts, int64_t size,
               std::vector<double> mean, std::vector<double> std, ScalarType dtype, int64_t space_to_depth) {
  return on_crops(images, offsets, flips, shifts, size, mean, std, dtype, space_to_depth,
                  [](const Augment& p, const AugmentInputs& in, void* y) {
                    const int64_t down = p.height - p.size, right = p.width - p.size;
                    for (int64_t n = 0; n < p.out.batch; ++n) {
                      const int64_t top = in.offsets[2 * n], left = in.offsets[2 * n + 1];
                      check(top >= 0 && top <= down && left >= 0 && left <= right, "offsets[", n, "] is [", top, ", ",
                            left, "], expected at least [0, 0] and at most [", down, ", ", right, "]");
                    }
                    on_cpu(augment_units(p),
                           [&](auto isa, int64_t begin, int64_t end) { augment_cpu<isa.value>(p, in, y, begin, end); });
                  });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) { m.impl("augment", TORCH_BOX(&alexnet_ext::forward)); }
