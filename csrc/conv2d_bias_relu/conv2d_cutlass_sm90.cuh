// The convolution and the gradient of its input for compute capability 9.0: images come by TMA's im2col and products by
// wgmma, through CUTLASS's collectives. One launch a group; stride 1. One direction and dtype is compiled a file.
#pragma once

// clang-format off: the second is counted on by what follows.
#include <cute/tensor.hpp>
#include <cutlass/kernel_hardware_info.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
// clang-format on

#include "conv2d_cutlass.h"
#include "cutlass_element.cuh"

namespace alexnet_ext {

// max(0, v), written so that NaN stays.
template <class T>
struct Relu {
  CUTLASS_HOST_DEVICE T operator()(const T& v) const { return v <= T(0) ? T(0) : v; }
};
template <class T, int N>
struct Relu<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(const cutlass::Array<T, N>& values) const {
    cutlass::Array<T, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = Relu<T>()(values[i]);
    return result;
  }
};

// Blocks of 128 x kColumns results, in steps of 128 bytes of channels: one warp group multiplies, another one loads. Of
// 64 columns two blocks share a multiprocessor, with four steps of 24 KiB in flight each; of 128, one has all of it.
template <class T, cutlass::conv::Operator kDirection, int kColumns>
struct HopperProduct {
  using E = CutlassElement<T>;
  using Nhwc = cutlass::layout::TensorNHWC;
  using Block = cute::Shape<cute::_128, cute::Int<kColumns>, cute::Shape<cute::Int<128 / sizeof(E)>>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  static constexpr int kAccess = 16 / sizeof(E);
  static constexpr bool kForward = kDirection == cutlass::conv::Operator::kFprop;
  // The sums are fp32; the bias is added to each column and rounding comes last.
  using Fusion =
      std::conditional_t<kForward, cutlass::epilogue::fusion::LinCombPerColBiasEltAct<Relu, E, float, E, void, float>,
                         cutlass::epilogue::fusion::LinearCombination<E, float, void, float>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Block, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Nhwc, kAccess, E, Nhwc, kAccess,
      cutlass::epilogue::TmaWarpSpecialized, Fusion>::CollectiveOp;
  using Stages = std::conditional_t<
      kColumns == 64, cutlass::conv::collective::StageCount<4>,
      cutlass::conv::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>>;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kDirection, E, Nhwc, kAccess, E, Nhwc, kAccess, float, Block,
      Cluster, Stages, cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Problem = cutlass::conv::ConvProblemShape<kDirection, 2>;
  using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;
  using Convolution = cutlass::conv::device::ConvUniversalAdapter<Kernel>;

  // One group as a problem of its own, with the strides of the whole tensors.
  static Problem problem_of_group(const Conv2d& p) {
    auto n = [](int64_t v) { return static_cast<int>(v); };
    using Extent = typename Problem::TensorExtent;
    using Stride = typename Problem::TensorStride;
    const Extent x{n(p.batch), n(p.height), n(p.width), n(p.group_channels())};
    const Extent weight{n(p.group_filters()), n(p.taps_h), n(p.taps_w), n(p.group_channels())};
    const Stride of_x{p.height * p.width * p.channels, p.width * p.channels, p.channels, 1};
    const Stride of_weight{p.taps(), p.taps_w * p.group_channels(), p.group_channels(), 1};
    const Stride of_y{p.out_height * p.out_width * p.filters, p.out_width * p.filters, p.filters, 1};
    const typename Problem::SpatialExtent padding{n(p.padding[0]), n(p.padding[1])};
    return {cutlass::conv::Mode::kCrossCorrelation,
            x,
            of_x,
            weight,
            of_weight,
            of_y,
            padding,
            padding,
            {n(p.stride[0]), n(p.stride[1])},
            {n(p.dilation[0]), n(p.dilation[1])},
            1};
  }

  // Of images (x, or dz) and the weight, into `result` (y, or dx): their first elements, and the group's bias or null.
  static typename Kernel::Arguments arguments(const Conv2d& p, const E* images, const E* weight, E* result,
                                              const E* bias) {
    const Problem problem = problem_of_group(p);
    // Of the result's columns, rows and images.
    const typename Kernel::StrideD stride{{problem.stride_C[2], problem.stride_C[1], problem.stride_C[0]}, {}, {}};
    typename Epilogue::Arguments epilogue{{}, nullptr, {}, result, stride};
    epilogue.thread.alpha = 1.0f;
    epilogue.thread.beta = 0.0f;
    if constexpr (kForward) epilogue.thread.bias_ptr = bias;
    return {cutlass::gemm::GemmUniversalMode::kGemm, problem, {images, weight}, epilogue};
  }

  // One launch a group; a null bias adds nothing.
  static int run(const Conv2d& p, const void* images, const void* weight, const void* bias, void* result,
                 void* stream) {
    for (int64_t group = 0; group < p.groups; ++group) {
      const Conv2dSlice first = slice_of(p, group);
      const E* in = static_cast<const E*>(images) + (kForward ? first.x : first.y);
      E* out = static_cast<E*>(result) + (kForward ? first.y : first.x);
      const E* added = bias == nullptr ? nullptr : static_cast<const E*>(bias) + first.y;
      const auto given = arguments(p, in, static_cast<const E*>(weight) + first.weight, out, added);
      if (Convolution::can_implement(given) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
      if (Convolution().run(given, nullptr, static_cast<cudaStream_t>(stream)) != cutlass::Status::kSuccess)
        return cudaErrorLaunchFailure;
    }
    return cudaGetLastError();
  }
};

// 128 columns, which wgmma reads the fewest bytes a product for; the gradient's are the inputs of a group, 48 for
// conv2.
template <class T>
using ForwardSm90 = HopperProduct<T, cutlass::conv::Operator::kFprop, 128>;
template <class T>
using InputGradientSm90 = HopperProduct<T, cutlass::conv::Operator::kDgrad, 64>;

template <class T>
int conv2d_forward_sm90(const Conv2d& p, const void* x, const void* weight, const void* bias, void* y, void* stream) {
  if (p.pixels() == 0) return cudaSuccess;
  return ForwardSm90<T>::run(p, x, weight, bias, y, stream);
}

template <class T>
int conv2d_input_gradient_sm90(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream) {
  if (p.batch == 0) return cudaSuccess;
  return InputGradientSm90<T>::run(p, dz, weight, nullptr, dx, stream);
}

}  // namespace alexnet_ext
