// augment as a PyTorch operator on CUDA. It runs on the images' device and its current stream, and checks the launch.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_stream.h"
#include "augment_plan.h"

namespace alexnet_ext {
namespace {

Tensor forward(const Tensor& images, const Tensor& offsets, const Tensor& flips, const Tensor& shifts, int64_t size,
               std::vector<double> mean, std::vector<double> std, ScalarType dtype, int64_t space_to_depth) {
  CudaStream stream(images);
  return on_crops(images, offsets, flips, shifts, size, mean, std, dtype, space_to_depth,
                  [&](const Augment& p, const AugmentInputs& in, void* y) {
                    stream.check("augment", augment_cuda(p, in, y, stream.get()));
                  });
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CUDA, m) { m.impl("augment", TORCH_BOX(&alexnet_ext::forward)); }
