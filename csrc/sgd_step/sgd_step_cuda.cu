#include "sgd_step_kernels.cuh"

namespace alexnet_ext {

int sgd_step_cuda(const SgdStep& step, const SgdTensor* tensors, int64_t count, void* stream) {
  cudaError_t status = cudaSuccess;
  with_type(step.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVector<T>;
    for (int64_t begin = 0; begin < count && status == cudaSuccess; begin += kSgdTensors) {
      SgdTensors work;
      for (int64_t t = begin; t < count && t < begin + kSgdTensors; ++t) work.add(tensors[t], kBlockThreads * V);
      status = work.chunks > INT32_MAX
                   ? cudaErrorInvalidValue
                   : launch(sgd_step_vectors_kernel<T, V>, work.chunks, 0, stream, DeviceSgdStep<Acc<T>>(step), work);
    }
  });
  return status;
}

}  // namespace alexnet_ext
