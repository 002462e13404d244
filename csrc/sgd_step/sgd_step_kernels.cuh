// A step of SGD on CUDA: a thread takes 16 bytes of one tensor's gradient, and what belongs to them. Bytes: each buffer
// is read once and written once; the tensors' addresses are in the constant bank.
#pragma once

#include "../common/images.cuh"
#include "sgd_step.h"

namespace alexnet_ext {

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// SgdStep as a kernel's argument.
template <class A>
struct DeviceSgdStep {
  A lr, mu, rest, decay;
  bool nesterov, maximize, first_step;
  const float *lr_tensor, *grad_scale, *found_inf;

  explicit DeviceSgdStep(const SgdStep& step)
      : lr(static_cast<A>(step.lr)),
        mu(static_cast<A>(step.mu)),
        rest(static_cast<A>(1 - step.dampening)),
        decay(static_cast<A>(step.weight_decay)),
        nesterov(step.nesterov),
        maximize(step.maximize),
        first_step(step.first_step),
        lr_tensor(step.lr_tensor),
        grad_scale(step.grad_scale),
        found_inf(step.found_inf) {}
};

// A block's work is a chunk: neighbouring elements of one tensor, V a thread. (In a loop over chunks nvcc splits the
// 16-byte stores.)
struct SgdTensors {
  int count = 0;
  int64_t chunks = 0;
  int64_t first[kSgdTensors];  // the first chunk of each
  bool aligned[kSgdTensors];
  SgdTensor tensors[kSgdTensors];

  void add(const SgdTensor& t, int64_t chunk) {
    first[count] = chunks;
    aligned[count] = alexnet_ext::aligned(t.parameter, t.momentum, t.gradient, t.weight);
    tensors[count++] = t;
    chunks += ceil_div(t.size, chunk);
  }

  // The last tensor whose first chunk is not after this one.
  __device__ int tensor_of(int64_t chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// V elements from offset i on.
template <int V, class T>
__device__ inline void update(const DeviceSgdStep<Acc<T>>& step, const SgdTensor& tensor, int64_t i, Acc<T> lr) {
  using A = Acc<T>;
  A p[V], u[V], *parameter = static_cast<A*>(tensor.parameter) + i;
  load<V>(p, parameter);
  load<V>(u, static_cast<const T*>(tensor.gradient) + i);
  const A scale = step.grad_scale != nullptr ? static_cast<A>(*step.grad_scale) : A(1);
  if (scale != 1)
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] /= scale;
  if (step.maximize)
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] = -u[j];
  if (step.decay != 0)
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] = fused(step.decay, p[j], u[j]);
  if (tensor.momentum != nullptr) {
    A m[V], *momentum = static_cast<A*>(tensor.momentum) + i;
    if (!step.first_step) load<V>(m, momentum);
#pragma unroll
    for (int j = 0; j < V; ++j) m[j] = step.first_step ? u[j] : fused(step.rest, u[j], step.mu * m[j]);
    store<V>(momentum, m);
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] = step.nesterov ? fused(step.mu, m[j], u[j]) : m[j];
  }
#pragma unroll
  for (int j = 0; j < V; ++j) p[j] = fused(-lr, u[j], p[j]);
  store<V>(parameter, p);
  if (tensor.weight != nullptr) store<V>(static_cast<T*>(tensor.weight) + i, p);
}

template <class T, int V>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    sgd_step_vectors_kernel(DeviceSgdStep<Acc<T>> step, SgdTensors work) {
  if (step.found_inf != nullptr && *step.found_inf != 0) return;
  const Acc<T> lr = step.lr_tensor != nullptr ? static_cast<Acc<T>>(*step.lr_tensor) : step.lr;
  const int t = work.tensor_of(blockIdx.x);
  const SgdTensor& tensor = work.tensors[t];
  const int64_t i = ((blockIdx.x - work.first[t]) * kBlockThreads + threadIdx.x) * V;
  if (work.aligned[t] && i + V <= tensor.size) {
    update<V, T>(step, tensor, i, lr);
  } else {
#pragma unroll 1
    for (int64_t j = i; j < tensor.size && j < i + V; ++j) update<1, T>(step, tensor, j, lr);
  }
}

}  // namespace alexnet_ext
