// The convolution's gradient of the weight for compute capability 9.0 alone: wgmma, fed by TMA, with fp32 sums.
// Operands are bf16 or fp16 and channels-last. One launch takes all groups, each a slice of the whole tensors.
//
// CUTLASS's own collective does not serve: it needs dense tensors, and a block takes one tap and all pixels. AlexNet's
// 48 channels of a tap would leave most of a block idle, and its 25 to 54 blocks most of a GPU. A block here takes up
// to four columns, each 64 channels of one tap, and loads the pixels of dz once for all four.
#pragma once

#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cutlass/cuda_host_adapter.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "../../common/channel_sums.cuh"
#include "../../common/images.cuh"
#include "../cutlass_element.h"
#include "conv2d_sm90.h"

namespace alexnet_ext {

// Two groups of four warps multiply; each has 64 filters x 256 channels of sums, 128 registers a thread. One warp
// loads.
constexpr int kSm90WeightThreads = 2 * 128 + 32;
// A box of 64 pixels x 64 channels is 8 KiB, 128 bytes a pixel. A step has six boxes, and four steps are in flight.
constexpr int kSm90WeightStages = 4;
constexpr int kBoxBytes = kSm90WeightPixels * kSm90WeightChannels * 2;

// The kernel's arguments, the same for every block. The descriptor `x` gathers the pixels that a tap of 64 output
// pixels reads (im2col). `channels` and `filters` are those of a group.
struct Sm90WeightWork {
  CUtensorMap dz, x;
  float* sums;  // [splits][groups][filters][taps][channels]
  int groups, filters, taps, channels, channel_blocks;
  int taps_w, dilation[2], padding[2];
  int out_height, out_width;
  int steps, steps_of_split;
};

template <class T>
struct Sm90WeightProduct {
  using E = Element<T>;
  using Filters = cute::Int<kSm90WeightFilters>;
  using Columns = cute::Int<kSm90WeightColumns * kSm90WeightChannels>;
  using Pixels = cute::Int<kSm90WeightPixels>;
  static constexpr auto kAcross = cute::GMMA::Major::MN;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<E, E, float, cute::Shape<Filters, Columns, Pixels>, kAcross, kAcross>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  // Boxes one after the other, swizzled as TMA writes them.
  template <class Rows>
  using Boxes = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<E>{},
                                             cute::Shape<Rows, Pixels, cute::Int<kSm90WeightStages>>{},
                                             cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using Pipeline = cutlass::PipelineTmaAsync<kSm90WeightStages>;
  struct Shared {
    alignas(1024) E dz[cute::cosize_v<Boxes<Filters>>];
    alignas(1024) E x[cute::cosize_v<Boxes<Columns>>];
    typename Pipeline::SharedStorage pipeline;
  };
};

// The block's part of the work: filters and columns of one group, over one split of the pixels.
struct Sm90WeightBlock {
  int split, group, filter, column, columns, begin, end;

  __device__ explicit Sm90WeightBlock(const Sm90WeightWork& work) {
    split = blockIdx.z;
    group = blockIdx.y % work.groups;
    filter = blockIdx.y / work.groups * kSm90WeightFilters;
    column = blockIdx.x * kSm90WeightColumns;
    columns = min(kSm90WeightColumns, work.taps * work.channel_blocks - column);
    begin = split * work.steps_of_split;
    end = min(begin + work.steps_of_split, work.steps);
  }
};

// The output pixel that a step begins with. The next step's is found without a division: with divisions the thread
// that loads would need longer for a step than its products do.
struct Sm90WeightPixel {
  int image, row, column;

  __device__ Sm90WeightPixel(const Sm90WeightWork& work, int pixel) {
    const int rows = pixel / work.out_width;
    column = pixel - rows * work.out_width;
    image = rows / work.out_height;
    row = rows - image * work.out_height;
  }

  // Moves on by `by`, itself less than an image in rows and less than a row in columns.
  __device__ void move(const Sm90WeightWork& work, const Sm90WeightPixel& by) {
    column += by.column, row += by.row, image += by.image;
    if (column >= work.out_width) column -= work.out_width, ++row;
    if (row >= work.out_height) row -= work.out_height, ++image;
  }
};

// One thread loads the block's pixels, step after step.
template <class P>
__device__ inline void load_sm90_weight_pixels(const Sm90WeightWork& work, const Sm90WeightBlock& block,
                                               typename P::Pipeline& pipeline, typename P::Shared& shared) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr int kBox = kSm90WeightPixels * kSm90WeightChannels, kHalves = kSm90WeightFilters / kSm90WeightChannels;
  const int filter = block.group * work.filters + block.filter;
  int channel[kSm90WeightColumns];
  uint16_t right[kSm90WeightColumns], down[kSm90WeightColumns];
#pragma unroll
  for (int i = 0; i < kSm90WeightColumns; ++i) {
    const int tap = (block.column + i) / work.channel_blocks, tap_h = tap / work.taps_w;
    channel[i] = block.group * work.channels + (block.column + i - tap * work.channel_blocks) * kSm90WeightChannels;
    right[i] = static_cast<uint16_t>((tap - tap_h * work.taps_w) * work.dilation[1]);
    down[i] = static_cast<uint16_t>(tap_h * work.dilation[0]);
  }
  const Sm90WeightPixel step_length(work, kSm90WeightPixels);
  Sm90WeightPixel first(work, block.begin * kSm90WeightPixels);
  auto state = cutlass::make_producer_start_state<typename P::Pipeline>();
#pragma unroll 1
  for (int step = block.begin; step < block.end; ++step, ++state, first.move(work, step_length)) {
    pipeline.producer_acquire(state);
    uint64_t* const arrived = pipeline.producer_get_barrier(state);
#pragma unroll
    for (int i = 0; i < kHalves; ++i)
      cute::SM90_TMA_LOAD_2D::copy(&work.dz, arrived, kHint, &shared.dz[(state.index() * kHalves + i) * kBox],
                                   filter + i * kSm90WeightChannels, step * kSm90WeightPixels);
#pragma unroll
    for (int i = 0; i < kSm90WeightColumns; ++i) {
      if (i >= block.columns) break;
      cute::SM90_TMA_LOAD_IM2COL_4D::copy(&work.x, arrived, &shared.x[(state.index() * kSm90WeightColumns + i) * kBox],
                                          channel[i], first.column - work.padding[1], first.row - work.padding[0],
                                          first.image, right[i], down[i]);
    }
  }
}

// A store writes two neighbouring channels of a filter. Four lanes of a warp together write 32 bytes, for each of two
// filters.
template <class Sums>
__device__ inline void store_sm90_weight_sums(const Sm90WeightWork& work, const Sm90WeightBlock& block, int thread,
                                              const Sums& sums) {
  const int lane = thread % kWarp;
  const int64_t first = (static_cast<int64_t>(block.split) * work.groups + block.group) * work.filters;
#pragma unroll
  for (int i = 0; i < kSm90WeightColumns; ++i) {
    const int tap = (block.column + i) / work.channel_blocks;
    const int channel = (block.column + i - tap * work.channel_blocks) * kSm90WeightChannels + lane % 4 * 2;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int filter = block.filter + thread / kWarp * 16 + lane / 4 + below * 8;
      float* to = work.sums + ((first + filter) * work.taps + tap) * work.channels + channel;
#pragma unroll
      for (int n = 0; n < kSm90WeightChannels; n += 8) {
        const auto at = [&](int right) { return sums(cute::make_coord(right, below, i * 8 + n / 8), 0, 0); };
        if (i < block.columns && filter < work.filters && channel + n < work.channels)
          *reinterpret_cast<float2*>(to + n) = {at(0), at(1)};
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSm90WeightThreads, 1)
    weight_gradient_sm90_kernel(const __grid_constant__ Sm90WeightWork work) {
  using P = Sm90WeightProduct<T>;
  using Pipeline = typename P::Pipeline;
  auto& shared = *shared_memory<typename P::Shared>();  // aligned to 1 KiB, as the kernel has no other shared memory
  const Sm90WeightBlock block(work);
  const int thread = threadIdx.x;
  const bool loads = cutlass::canonical_warp_idx_sync() == kSm90WeightThreads / kWarp - 1;

  typename Pipeline::Params roles;
  roles.transaction_bytes = (kSm90WeightFilters / kSm90WeightChannels + block.columns) * kBoxBytes;
  roles.role = loads ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  roles.is_leader = loads && cute::elect_one_sync();
  roles.num_consumers = kSm90WeightThreads - kWarp;
  Pipeline pipeline(shared.pipeline, roles, cute::Shape<cute::_1, cute::_1, cute::_1>{});
  __syncthreads();
  if (loads) {
    if (roles.is_leader) load_sm90_weight_pixels<P>(work, block, pipeline, shared);
    return;
  }

  typename P::Mma product;
  const auto own = product.get_slice(thread);
  const auto boxes = [&](auto rows, auto* data) {
    return cute::make_tensor(cute::make_smem_ptr(data), typename P::template Boxes<decltype(rows)>{});
  };
  const auto dz = own.make_fragment_A(own.partition_A(boxes(typename P::Filters{}, shared.dz)));
  const auto x = own.make_fragment_B(own.partition_B(boxes(typename P::Columns{}, shared.x)));
  auto sums = cute::partition_fragment_C(product, cute::Shape<typename P::Filters, typename P::Columns>{});
  cute::clear(sums);
  cutlass::PipelineState<kSm90WeightStages> here, released;
  for (int step = block.begin; step < block.end; ++step, ++here) {
    pipeline.consumer_wait(here);
    cute::warpgroup_fence_operand(sums);
    cute::warpgroup_arrive();
    cute::gemm(product, dz(cute::_, cute::_, cute::_, here.index()), x(cute::_, cute::_, cute::_, here.index()), sums);
    cute::warpgroup_commit_batch();
    // This step's products are still running; the products of the step before have ended, so its boxes are free.
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(sums);
    if (step == block.begin) continue;
    pipeline.consumer_release(released);
    ++released;
  }
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(sums);
  store_sm90_weight_sums(work, block, thread, sums);
}

// ---- on the host

// Sets the descriptors: dz as [pixels][filters], and x as the pixels that TMA gathers for a tap of output pixels.
// Returns false if a descriptor cannot express the problem.
template <class T>
bool describe_sm90_weight_pixels(const Conv2d& p, const void* dz, const void* x, Sm90WeightWork& work) {
  const auto type = cute::TMA::to_CUtensorMapDataType<Element<T>>();
  constexpr auto kPlain = CU_TENSOR_MAP_INTERLEAVE_NONE;
  constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  constexpr auto kZero = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  const auto n = [](int64_t v) { return static_cast<cuuint64_t>(v); };
  constexpr cuuint32_t kOnes[] = {1, 1, 1, 1}, kBox[] = {kSm90WeightChannels, kSm90WeightPixels};

  const cuuint64_t dz_sizes[] = {n(p.filters), n(p.pixels())}, dz_strides[] = {n(p.filters * sizeof(T))};
  const cuuint64_t pixel = n(p.channels * sizeof(T)), row = n(p.width) * pixel;
  const cuuint64_t x_sizes[] = {n(p.channels), n(p.width), n(p.height), n(p.batch)};
  const cuuint64_t x_strides[] = {pixel, row, n(p.height) * row};
  int lower[2], upper[2];  // of (width, height)
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = p.dilation[1 - i] * ((i == 0 ? p.taps_w : p.taps_h) - 1);
    lower[i] = static_cast<int>(-p.padding[1 - i]);
    upper[i] = static_cast<int>(p.padding[1 - i] - reach);
  }
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(&work.dz, type, 2u, const_cast<void*>(dz), dz_sizes,
                                                                  dz_strides, kBox, kOnes, kPlain, kSwizzle, kPromotion,
                                                                  kZero) == CUDA_SUCCESS &&
         CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeIm2col)(&work.x, type, 4u, const_cast<void*>(x), x_sizes,
                                                                   x_strides, lower, upper, kBox[0], kBox[1], kOnes,
                                                                   kPlain, kSwizzle, kPromotion, kZero) == CUDA_SUCCESS;
}

template <class T>
int conv2d_weight_gradient_sm90(const Conv2d& p, const void* dz, const void* x, void* workspace, void* dweight,
                                void* stream) {
  if (p.pixels() == 0)
    return cudaMemsetAsync(dweight, 0, p.filters * p.taps() * sizeof(T), static_cast<cudaStream_t>(stream));
  const auto n = [](int64_t v) { return static_cast<int>(v); };
  const Sm90WeightPlan plan(p);
  Sm90WeightWork work{};
  work.sums = static_cast<float*>(workspace);
  work.groups = n(p.groups), work.filters = n(p.group_filters());
  work.taps = n(p.taps_h * p.taps_w), work.channels = n(p.group_channels());
  work.channel_blocks = n(plan.channel_blocks);
  work.taps_w = n(p.taps_w), work.out_height = n(p.out_height), work.out_width = n(p.out_width);
  for (int i = 0; i < 2; ++i) work.dilation[i] = n(p.dilation[i]), work.padding[i] = n(p.padding[i]);
  work.steps = n(plan.steps), work.steps_of_split = n(plan.steps_of_split);
  if (p.stride[0] != 1 || p.stride[1] != 1 || p.group_channels() % 2 != 0 || !aligned(workspace) ||
      !describe_sm90_weight_pixels<T>(p, dz, x, work))
    return cudaErrorInvalidValue;

  const auto kernel = reinterpret_cast<const void*>(&weight_gradient_sm90_kernel<T>);
  constexpr int kBytes = sizeof(typename Sm90WeightProduct<T>::Shared);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const auto grid = [](int64_t v) { return static_cast<unsigned>(v); };
  void* given[] = {&work};
  status = cudaLaunchKernel(kernel, {grid(plan.column_blocks), grid(plan.filter_blocks * p.groups), grid(plan.splits)},
                            {kSm90WeightThreads, 1, 1}, given, kBytes, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) return status;
  return sum_rows<T, 32, 4>(plan.splits, p.filters * p.taps(), workspace, dweight, stream);
}

}  // namespace alexnet_ext
