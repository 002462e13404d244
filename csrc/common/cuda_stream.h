// Makes a tensor's device current for the lifetime of the object, and holds that device's current stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "channel_sums.h"
#include "tensor.h"

namespace alexnet_ext {

class CudaStream {
 public:
  explicit CudaStream(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }

  void* get() const { return stream_; }

  // Throws std::runtime_error with the kernel's name when its launch failed.
  void check(const char* kernel, int status) const {
    alexnet_ext::check(status == cudaSuccess, kernel,
                       " did not launch: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The sum of each channel, in x's dtype, and the workspace of its rows, in the arithmetic type.
struct DeviceSums {
  Tensor rows, total;

  DeviceSums(const Tensor& x, const Images& s) : rows(x), total(x) {
    const int64_t workspace[] = {sum_rows_of(s), s.channels}, size[] = {s.channels};
    const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    rows = torch::stable::empty({workspace, 2}, wide, std::nullopt, x.device());
    total = torch::stable::empty({size, 1}, x.scalar_type(), std::nullopt, x.device());
  }
};

}  // namespace alexnet_ext
