// The device and the current stream of a tensor, for as long as the object lives.
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

  // Throws with the kernel's name where its launch failed.
  void check(const char* kernel, int status) const {
    alexnet_ext::check(status == cudaSuccess, kernel,
                       " did not launch: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Sums for each channel, and the workspace in which kernels leave their rows of them, in the arithmetic type of x.
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
