// The convolution and its gradient of x as CUTLASS's implicit products for compute capability 9.0 alone. TMA gathers
// the pixels (im2col) and feeds wgmma. Operands are channels-last, sums fp32. A launch takes up to kGroupsAtOnce
// groups, each a slice of the whole tensors. Each .cu file compiles one direction and dtype.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/kernel_hardware_info.h>

#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "../../common/images.cuh"
#include "../cutlass_element.h"
#include "conv2d_sm90.h"

namespace alexnet_ext {

using cutlass::conv::Operator;

// The epilogues. Sums stores the sums; Forward stores max(least, sum + bias), where a null bias is 0 and NaN passes.
namespace stored {
namespace fusion = cutlass::epilogue::fusion;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

template <class E, class Tile>
using Forward = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::LowerBound, E, float, kRound>,
                                fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>,
                                                fusion::Sm90RowBroadcast<0, Tile, E, float>, fusion::Sm90AccFetch>>;
template <class E>
using Sums =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, E, float, kRound>, fusion::Sm90AccFetch>;
}  // namespace stored

// The kernel of a direction. A block computes 128 pixels x kColumns channels, in steps of 128 bytes of channels of one
// tap. One warp loads and four multiply; kBlocks blocks share a multiprocessor and fill its shared memory with steps in
// flight. The two blocks of a cluster need the same weights, and each reads one half for both. By arithmetic a block of
// 128 x 128 then reads 48 bytes a clock at full speed instead of 64.
template <Operator kDirection, class T, int kColumns, int kBlocks>
struct Sm90Product {
  using E = Element<T>;
  using Nhwc = cutlass::layout::TensorNHWC;
  using Tile = cute::Shape<cute::_128, cute::Int<kColumns>, cute::Shape<cute::Int<128 / sizeof(E)>>>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  static constexpr int kAccess = 16 / sizeof(E);
  using Stored = cute::conditional_t<kDirection == Operator::kFprop, stored::Forward<E, Tile>, stored::Sums<E>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Nhwc, kAccess, E, Nhwc, kAccess,
      cutlass::epilogue::TmaWarpSpecialized, Stored>::CollectiveOp;
  // A multiprocessor has 228 KiB, and the system reserves 1 KiB of it for each block.
  static constexpr int kOthersBytes = (kBlocks - 1) * (228 * 1024 / kBlocks + 1024);
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kDirection, E, Nhwc, kAccess, E, Nhwc, kAccess, float, Tile,
      Cluster,
      cutlass::conv::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage) + kOthersBytes>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  struct Kernel
      : cutlass::conv::kernel::ConvUniversal<cutlass::conv::ConvProblemShape<kDirection, 2>, Mainloop, Epilogue> {
    static constexpr int kBlocksPerProcessor = kBlocks;
    static_assert(kBlocks * (Kernel::SharedStorageSize + 1024) <= 228 * 1024, "blocks share a multiprocessor");
  };
};

// Several groups in one kernel: blocks with z-index z compute group z. AlexNet's two towers fill a GPU better together.
constexpr int kGroupsAtOnce = 2;
template <class Kernel>
struct Groups {
  static constexpr int MaxThreadsPerBlock = Kernel::MaxThreadsPerBlock;
  static constexpr int MinBlocksPerMultiprocessor = Kernel::kBlocksPerProcessor;
  struct Params {
    typename Kernel::Params group[kGroupsAtOnce];
  };
  static_assert(sizeof(Params) <= 4096, "a kernel's arguments");

  CUTLASS_DEVICE void operator()(const Params& params, char* shared) const {
    Kernel()(params.group[blockIdx.z], shared);
  }
};

// One group as a convolution without groups, with the strides of the whole tensors.
template <Operator kDirection>
cutlass::conv::ConvProblemShape<kDirection, 2> sm90_problem_of_group(const Conv2d& p) {
  auto n = [](int64_t v) { return static_cast<int>(v); };
  using Problem = cutlass::conv::ConvProblemShape<kDirection, 2>;
  using Strides = typename Problem::TensorStride;
  auto strides = [](int64_t height, int64_t width, int64_t channels) {
    return Strides{height * width * channels, width * channels, channels, 1};
  };
  const typename Problem::SpatialExtent padding{n(p.padding[0]), n(p.padding[1])};
  return {cutlass::conv::Mode::kCrossCorrelation,
          {n(p.batch), n(p.height), n(p.width), n(p.group_channels())},
          strides(p.height, p.width, p.channels),
          {n(p.group_filters()), n(p.taps_h), n(p.taps_w), n(p.group_channels())},
          strides(p.taps_h, p.taps_w, p.group_channels()),
          strides(p.out_height, p.out_width, p.filters),
          padding,
          padding,
          {n(p.stride[0]), n(p.stride[1])},
          {n(p.dilation[0]), n(p.dilation[1])},
          1};
}

// Whether CUTLASS accepts a group: stride 1, aligned pointers, and offsets of taps that fit into 8 bits.
template <class Kernel>
bool sm90_takes(const typename Kernel::Arguments& arguments) {
  return arguments.problem_shape.traversal_stride == cute::array<int, 2>{1, 1} && Kernel::can_implement(arguments) &&
         aligned(arguments.mainloop.ptr_A, arguments.mainloop.ptr_B, arguments.epilogue.ptr_D);
}

// Launches every group with arguments_of(its slice), kGroupsAtOnce groups at a time.
template <class Kernel, class F>
int launch_groups(const Conv2d& p, void* stream, F&& arguments_of) {
  const auto kernel = reinterpret_cast<const void*>(&cutlass::device_kernel<Groups<Kernel>>);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  for (int64_t begin = 0; begin < p.groups && status == cudaSuccess; begin += kGroupsAtOnce) {
    const int64_t count = p.groups - begin < kGroupsAtOnce ? p.groups - begin : kGroupsAtOnce;
    typename Groups<Kernel>::Params params{};
    for (int64_t i = 0; i < count; ++i) {
      const typename Kernel::Arguments arguments = arguments_of(slice_of(p, begin + i));
      if (!sm90_takes<Kernel>(arguments)) return cudaErrorInvalidValue;
      params.group[i] = Kernel::to_underlying_arguments(arguments, nullptr);
    }
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {cute::size<0>(typename Kernel::ClusterShape()), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params.group[0]);
    config.gridDim.z = static_cast<unsigned>(count);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    void* given[] = {&params};
    status = cudaLaunchKernelExC(&config, kernel, given);
  }
  return status;
}

// ---- each direction's kernel, its arguments for a group, and its launcher

template <class T>
using Sm90Forward = typename Sm90Product<Operator::kFprop, T, 128, 1>::Kernel;
// The columns are a group's channels: in AlexNet 48, 192 and 256. With 96 columns a block, the sums leave registers for
// two blocks, so that one multiplies while the other stores.
template <class T>
using Sm90InputGradient = typename Sm90Product<Operator::kDgrad, T, 96, 2>::Kernel;

template <class Kernel, class Problem>
typename Kernel::StrideD sm90_strides_of_result(const Problem& problem) {
  const auto& nhwc = problem.stride_C;
  return {cute::make_stride(nhwc[2], nhwc[1], nhwc[0]), {}, {}};
}

template <class E>
E* sm90_slice(const void* tensor, int64_t first) {
  return tensor == nullptr ? nullptr : static_cast<E*>(const_cast<void*>(tensor)) + first;
}

template <class T>
typename Sm90Forward<T>::Arguments sm90_forward_arguments(const Conv2d& p, const Conv2dSlice& first, const void* x,
                                                          const void* weight, const void* bias, bool relu, void* y) {
  using E = Element<T>;
  const auto problem = sm90_problem_of_group<Operator::kFprop>(p);
  const auto strides = sm90_strides_of_result<Sm90Forward<T>>(problem);
  return {problem,
          {sm90_slice<E>(x, first.x), sm90_slice<E>(weight, first.weight)},
          {{{{sm90_slice<E>(bias, first.y)}, {}, {}}, {least_of(relu)}},
           nullptr,
           strides,
           sm90_slice<E>(y, first.y),
           strides}};
}

template <class T>
typename Sm90InputGradient<T>::Arguments sm90_input_gradient_arguments(const Conv2d& p, const Conv2dSlice& first,
                                                                       const void* dz, const void* weight, void* dx) {
  using E = Element<T>;
  const auto problem = sm90_problem_of_group<Operator::kDgrad>(p);
  const auto strides = sm90_strides_of_result<Sm90InputGradient<T>>(problem);
  return {problem,
          {sm90_slice<E>(dz, first.y), sm90_slice<E>(weight, first.weight)},
          {{{}, {}}, nullptr, strides, sm90_slice<E>(dx, first.x), strides}};
}

template <class T>
int conv2d_forward_sm90(const Conv2d& p, const void* x, const void* weight, const void* bias, bool relu, void* y,
                        void* stream) {
  if (p.pixels() == 0) return cudaSuccess;
  return launch_groups<Sm90Forward<T>>(p, stream, [&](const Conv2dSlice& first) {
    return sm90_forward_arguments<T>(p, first, x, weight, bias, relu, y);
  });
}

template <class T>
int conv2d_input_gradient_sm90(const Conv2d& p, const void* dz, const void* weight, void* dx, void* stream) {
  if (p.batch == 0) return cudaSuccess;
  return launch_groups<Sm90InputGradient<T>>(
      p, stream, [&](const Conv2dSlice& first) { return sm90_input_gradient_arguments<T>(p, first, dz, weight, dx); });
}

}  // namespace alexnet_ext
