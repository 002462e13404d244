// The weight of a first layer turned to depth, and its gradient turned back, on CUDA.
#include "../common/images.cuh"
#include "conv2d_bias_relu.h"

namespace alexnet_ext {
namespace {

struct Depth {
  DepthWeight weight;
  int64_t count;  // of the elements with depth
  Divisor by_depth, by_columns, by_rows, by_step;

  explicit Depth(const DepthWeight& w)
      : weight(w),
        by_depth(w.channels * w.step * w.step),
        by_columns(ceil_div(w.width, w.step)),
        by_rows(ceil_div(w.height, w.step)),
        by_step(w.step) {
    count = w.filters * by_rows.value * by_columns.value * by_depth.value;
  }
};

// A thread takes elements with depth, which are channels-last. Back, it writes those that are in the weight.
template <class T, bool kBack>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    depth_kernel(Depth p, const T* __restrict__ from, T* __restrict__ to) {
  const DepthWeight& w = p.weight;
  for_each(p.count, [&](int64_t i) {
    const int64_t tap = p.by_depth.divide(i), line = p.by_columns.divide(tap), filter = p.by_rows.divide(line);
    const int64_t inner = i - tap * p.by_depth.value, pair = p.by_step.divide(inner);
    const int64_t channel = p.by_step.divide(pair);
    const int64_t row = (line - filter * p.by_rows.value) * w.step + pair - channel * w.step;
    const int64_t column = (tap - line * p.by_columns.value) * w.step + inner - pair * w.step;
    const int64_t at = filter * w.strides[0] + channel * w.strides[1] + row * w.strides[2] + column * w.strides[3];
    const bool inside = row < w.height && column < w.width;
    if constexpr (!kBack)
      to[i] = inside ? from[at] : T{};
    else if (inside)
      to[at] = from[i];
  });
}

}  // namespace

int depth_weight_cuda(DType dtype, const DepthWeight& w, const void* from, void* to, bool back, void* stream) {
  const Depth p(w);
  cudaError_t status = cudaSuccess;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    status = launch(back ? depth_kernel<T, true> : depth_kernel<T, false>, blocks_for(p.count), 0, stream, p,
                    static_cast<const T*>(from), static_cast<T*>(to));
  });
  return status;
}

}  // namespace alexnet_ext
