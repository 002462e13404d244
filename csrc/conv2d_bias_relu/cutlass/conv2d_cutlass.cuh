// The convolution and its two gradients as CUTLASS's implicit products for compute capability 8.0 and newer (mma.sync,
// cp.async). Operands are channels-last, sums fp32; each group is one launch. Each .cu file compiles one direction and
// dtype.
#pragma once

#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/conv/device/implicit_gemm_convolution.h>
#include <cutlass/conv/kernel/default_conv2d_dgrad.h>
#include <cutlass/conv/kernel/default_conv2d_fprop.h>
#include <cutlass/conv/kernel/default_conv2d_wgrad.h>

#include "../../common/channel_sums.cuh"
#include "../cutlass_element.h"
#include "conv2d_cutlass.h"

namespace alexnet_ext {

using cutlass::conv::StrideSupport;
using cutlass::gemm::GemmShape;
using Nhwc = cutlass::layout::TensorNHWC;

// CUTLASS's mma.sync instruction, and the depth of a block's step: 64 bytes of channels or pixels.
template <class T>
struct TensorCore;
template <>
struct TensorCore<bf16> {
  using Instruction = GemmShape<16, 8, 16>;
  static constexpr int kDepth = 32;
};
template <>
struct TensorCore<f16> {
  using Instruction = GemmShape<16, 8, 16>;
  static constexpr int kDepth = 32;
};
template <>
struct TensorCore<float> {  // operands are rounded to the nearest TF32 when they are read from shared memory
  using Instruction = GemmShape<16, 8, 8>;
  static constexpr int kDepth = 16;
};

// The epilogue: stores fp32 sums in the type E, 16 bytes at a time. Forward it stores max(least, sum + bias).
template <class E, bool kForward>
struct Stored {
  using ElementOutput = E;
  using ElementAccumulator = float;
  using ElementCompute = float;
  static constexpr int kCount = 16 / sizeof(E);
  using FragmentOutput = cutlass::Array<E, kCount>;
  using FragmentAccumulator = cutlass::Array<float, kCount>;

  struct Params {
    bool bias = false;
    float least = least_of(false);
  };

  bool bias;
  float least;

  CUTLASS_HOST_DEVICE explicit Stored(const Params& params) : bias(params.bias), least(params.least) {}
  CUTLASS_HOST_DEVICE bool is_source_needed() const { return kForward && bias; }
  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}

  CUTLASS_HOST_DEVICE FragmentOutput operator()(FragmentAccumulator sums) const {
    if constexpr (kForward) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) sums[i] = sums[i] < least ? least : sums[i];  // <, so that NaN passes
    }
    return cutlass::NumericArrayConverter<E, float, kCount>()(sums);
  }

  CUTLASS_HOST_DEVICE FragmentOutput operator()(FragmentAccumulator sums, const FragmentOutput& values) const {
    const FragmentAccumulator wide = cutlass::NumericArrayConverter<float, E, kCount>()(values);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] += wide[i];
    return (*this)(sums);
  }
};

// The kernel of a direction (DefaultConv2dFprop, Dgrad or Wgrad). A block computes kRows x kColumns results with four
// warps of 64 x 64. Four steps are in flight; they take at most 80 KiB, so that two blocks share a multiprocessor of
// 164 KiB.
template <template <class, class, class, class, class, class, class, class, class, class, class, class, class, class,
                    int, class, cutlass::conv::IteratorAlgorithm, StrideSupport, int, int> class Direction,
          class T, int kRows, int kColumns, class Output, StrideSupport kStride, class E = Element<T>,
          int kDepth = TensorCore<T>::kDepth>
using ProductKernel =
    typename Direction<E, Nhwc, E, Nhwc, typename Output::ElementOutput, Nhwc, float, cutlass::arch::OpClassTensorOp,
                       cutlass::arch::Sm80, GemmShape<kRows, kColumns, kDepth>, GemmShape<64, 64, kDepth>,
                       typename TensorCore<T>::Instruction, Output,
                       cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, 4, cutlass::arch::OpMultiplyAdd,
                       cutlass::conv::IteratorAlgorithm::kOptimized, kStride, 16 / sizeof(E), 16 / sizeof(E)>::Kernel;

// Strides of a batch of images, or of the filters, in the whole tensor.
inline Nhwc layout_of(int64_t height, int64_t width, int64_t channels) {
  return {static_cast<int>(channels), static_cast<int>(width * channels), static_cast<int>(height * width * channels)};
}
inline Nhwc layout_of_x(const Conv2d& p) { return layout_of(p.height, p.width, p.channels); }
inline Nhwc layout_of_y(const Conv2d& p) { return layout_of(p.out_height, p.out_width, p.filters); }
inline Nhwc layout_of_weight(const Conv2d& p) { return layout_of(p.taps_h, p.taps_w, p.group_channels()); }

template <class E>
inline cutlass::TensorRef<E, Nhwc> slice(const void* tensor, int64_t first, const Nhwc& layout) {
  return {static_cast<E*>(const_cast<void*>(tensor)) + first, layout};
}

// One group as a convolution without groups.
inline cutlass::conv::Conv2dProblemSize problem_of_group(const Conv2d& p, int64_t splits = 1) {
  auto n = [](int64_t v) { return static_cast<int>(v); };
  const int channels = n(p.group_channels()), filters = n(p.group_filters());
  return {n(p.batch),     n(p.height),      n(p.width),       channels,
          filters,        n(p.taps_h),      n(p.taps_w),      n(p.out_height),
          n(p.out_width), n(p.padding[0]),  n(p.padding[1]),  n(p.stride[0]),
          n(p.stride[1]), n(p.dilation[0]), n(p.dilation[1]), cutlass::conv::Mode::kCrossCorrelation,
          n(splits)};
}

// launch() does not serve here, as its grids are lines of kBlockThreads, nor does CUTLASS's adapter, which clears the
// workspace first.
template <class Kernel>
inline int launch_product(const typename Kernel::Arguments& arguments, void* stream) {
  const bool boundary =
      aligned(arguments.ref_A.data(), arguments.ref_B.data(), arguments.ref_C.data(), arguments.ref_D.data());
  if (!boundary ||
      cutlass::conv::device::ImplicitGemmConvolution<Kernel>::can_implement(arguments) != cutlass::Status::kSuccess)
    return cudaErrorInvalidValue;
  const auto kernel = reinterpret_cast<const void*>(&cutlass::Kernel<Kernel>);
  constexpr size_t kBytes = sizeof(typename Kernel::SharedStorage);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  typename Kernel::Params params(arguments);
  void* given[] = {&params};
  return cudaLaunchKernel(kernel, typename Kernel::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape),
                          Kernel::kThreadCount, given, kBytes, static_cast<cudaStream_t>(stream));
}

// Calls f(group, slice) for each group until one fails.
template <class F>
inline int for_groups(const Conv2d& p, F&& f) {
  int status = cudaSuccess;
  for (int64_t group = 0; group < p.groups && status == cudaSuccess; ++group) status = f(group, slice_of(p, group));
  return status;
}

// ---- each direction's kernel, its arguments for a group, and its launcher

// 64 columns a block. AlexNet's groups have 48, 96, 128, 192 and 384 channels: 128 columns would leave a quarter or
// more unused.
template <class T>
using ForwardKernel = ProductKernel<cutlass::conv::kernel::DefaultConv2dFprop, T, 256, 64, Stored<Element<T>, true>,
                                    StrideSupport::kStrided>;
template <class T>
using InputGradientKernel = ProductKernel<cutlass::conv::kernel::DefaultConv2dDgrad, T, 256, 64,
                                          Stored<Element<T>, false>, StrideSupport::kUnity>;
template <class T>
using WeightGradientKernel = ProductKernel<cutlass::conv::kernel::DefaultConv2dWgrad, T, kWeightBlock, kWeightBlock,
                                           Stored<float, false>, StrideSupport::kStrided>;

template <class T>
typename ForwardKernel<T>::Arguments forward_arguments(const Conv2d& p, const Conv2dSlice& first, const void* x,
                                                       const void* weight, const void* bias, bool relu, void* y) {
  using E = Element<T>;
  // With strides of 0 every pixel of the source is the bias.
  const auto source = bias == nullptr ? cutlass::TensorRef<E, Nhwc>() : slice<E>(bias, first.y, {0, 0, 0});
  return {problem_of_group(p),
          slice<E>(x, first.x, layout_of_x(p)),
          slice<E>(weight, first.weight, layout_of_weight(p)),
          source,
          slice<E>(y, first.y, layout_of_y(p)),
          {bias != nullptr, least_of(relu)}};
}

template <class T>
typename InputGradientKernel<T>::Arguments input_gradient_arguments(const Conv2d& p, const Conv2dSlice& first,
                                                                    const void* dz, const void* weight, void* dx) {
  using E = Element<T>;
  const auto result = slice<E>(dx, first.x, layout_of_x(p));
  return {problem_of_group(p),
          slice<E>(dz, first.y, layout_of_y(p)),
          slice<E>(weight, first.weight, layout_of_weight(p)),
          result,
          result,
          {}};
}

// Split i writes its sums to partial[i], of [group_filters][taps].
template <class T>
typename WeightGradientKernel<T>::Arguments weight_gradient_arguments(const Conv2d& p, const Conv2dSlice& first,
                                                                      const void* dz, const void* x, float* partial) {
  using E = Element<T>;
  const auto result = slice<float>(partial, 0, layout_of_weight(p));
  return {problem_of_group(p, weight_gradient_splits(p)),
          slice<E>(dz, first.y, layout_of_y(p)),
          slice<E>(x, first.x, layout_of_x(p)),
          result,
          result,
          {},
          cutlass::conv::SplitKMode::kParallel};
}

template <class T>
int conv2d_forward_cutlass(const Conv2d& p, const void* x, const void* weight, const void* bias, bool relu, void* y,
                           void* stream) {
  if (p.pixels() == 0) return cudaSuccess;
  return for_groups(p, [&](int64_t, const Conv2dSlice& first) {
    return launch_product<ForwardKernel<T>>(forward_arguments<T>(p, first, x, weight, bias, relu, y), stream);
  });
}

template <class T>
int conv2d_input_gradient_cutlass(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream) {
  if (p.batch == 0) return cudaSuccess;
  return for_groups(p, [&](int64_t, const Conv2dSlice& first) {
    return launch_product<InputGradientKernel<T>>(input_gradient_arguments<T>(p, first, dz, weight, dx), stream);
  });
}

template <class T>
int conv2d_weight_gradient_cutlass(const Conv2d& p, const void* dz, const void* x, void* workspace, void* dweight,
                                   void* stream) {
  if (p.pixels() == 0)
    return cudaMemsetAsync(dweight, 0, p.filters * p.taps() * sizeof(T), static_cast<cudaStream_t>(stream));
  const int64_t splits = weight_gradient_splits(p), results = p.group_filters() * p.taps();
  return for_groups(p, [&](int64_t group, const Conv2dSlice& first) {
    float* partial = static_cast<float*>(workspace) + group * splits * results;
    const int status =
        launch_product<WeightGradientKernel<T>>(weight_gradient_arguments<T>(p, first, dz, x, partial), stream);
    if (status != cudaSuccess) return status;
    T* out = static_cast<T*>(dweight) + first.weight;
    return static_cast<int>(sum_rows<T, 32, 4>(splits, results, partial, out, stream));
  });
}

}  // namespace alexnet_ext
