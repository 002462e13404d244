#include "local_response_norm_kernels.cuh"

namespace alexnet_ext {
namespace {

// Calls f(Constant<n>) for n = 3, 5 or 7, the windows of the fast kernels.
template <class F>
cudaError_t with_window(int64_t size, F&& f) {
  if (size == 3) return f(Constant<3>{});
  if (size == 5) return f(Constant<5>{});
  return f(Constant<7>{});
}

bool has_lanes(const LocalResponseNorm& p, bool aligned) {
  return p.channel_stride == 1 && p.pixel_stride == p.channels && p.channels % kLaneChannels == 0 && aligned &&
         (p.batch == 1 || p.batch_stride == p.channels * p.pixels);
}

// Calls f(lanes of a pixel, offset, vectors) for runs of whole pixels that a kernel can count, until one fails.
template <class F>
cudaError_t for_runs(const LocalResponseNorm& p, F&& f) {
  const int64_t lanes = p.channels / kLaneChannels, all = p.batch * p.pixels * lanes, run = kMaxVectors / lanes * lanes;
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < all && status == cudaSuccess; first += run)
    status = f(Divisor(lanes), first * kLaneChannels, static_cast<int>(all - first < run ? all - first : run));
  return status;
}

// Threads count an image's elements in 32 bits, and some channels on both sides.
bool has_pixels(const LocalResponseNorm& p) {
  return p.pixel_stride == 1 && p.channel_stride == p.pixels && p.pixels <= INT32_MAX / (p.channels + 32);
}

Chunks chunks_of(const LocalResponseNorm& p) {
  constexpr int64_t kEnoughThreads = 1 << 18;
  return Chunks(p.pixels, p.channels, ceil_div(kEnoughThreads, p.batch * p.pixels));
}

Pixels pixels_of(const LocalResponseNorm& p) {
  return {p.batch_stride,
          p.channel_stride,
          p.pixel_stride,
          p.batch * p.channels * p.pixels,
          p.channel_stride > p.pixel_stride,
          Divisor(p.channels),
          Divisor(p.pixels)};
}

bool fits(const LocalResponseNorm& p) {
  const int64_t n = p.batch * p.channels * p.pixels;
  return p.channels <= kMaxSide && divides(n, p.channels) && divides(n, p.pixels);
}

}  // namespace

int local_response_norm_cuda(const LocalResponseNorm& p, const void* x, void* y, void* stream) {
  if (!fits(p)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceLrn<Acc<T>> lrn(p.lrn, p.channels);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    if constexpr (__is_same(Acc<T>, float)) {
      if (has_fast_lrn(p.lrn) && has_lanes(p, aligned(x, y))) {
        status = for_runs(p, [&](const Divisor& lanes, int64_t at, int vectors) {
          return with_window(p.lrn.size, [&](auto n) {
            return launch(local_response_norm_lanes_kernel<T, n.value>, lane_blocks(vectors), 0, stream, lrn, lanes,
                          vectors, in + at, out + at);
          });
        });
        return;
      }
      if (has_fast_lrn(p.lrn) && has_pixels(p)) {
        const Chunks work = chunks_of(p);
        const int64_t threads = p.batch * work.chunks * p.pixels;
        status = with_window(p.lrn.size, [&](auto n) {
          return launch(local_response_norm_pixels_kernel<T, n.value>, blocks_for(threads), 0, stream, lrn, work,
                        threads, p.batch_stride, in, out);
        });
        return;
      }
    }
    const Pixels work = pixels_of(p);
    status = launch(local_response_norm_kernel<T>, blocks_for(work.n), 0, stream, lrn, work, in, out);
  });
  return status;
}

int local_response_norm_backward_cuda(const LocalResponseNorm& p, const void* dy, const void* x, void* dx,
                                      void* stream) {
  if (!fits(p)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceLrn<Acc<T>> lrn(p.lrn, p.channels);
    const T *gradient = static_cast<const T*>(dy), *in = static_cast<const T*>(x);
    T* out = static_cast<T*>(dx);
    if constexpr (__is_same(Acc<T>, float)) {
      if (has_fast_lrn(p.lrn) && has_lanes(p, aligned(dy, x, dx))) {
        status = for_runs(p, [&](const Divisor& lanes, int64_t at, int vectors) {
          return with_window(p.lrn.size, [&](auto n) {
            return launch(local_response_norm_lanes_backward_kernel<T, n.value>, lane_blocks(vectors), 0, stream, lrn,
                          lanes, vectors, gradient + at, in + at, out + at);
          });
        });
        return;
      }
      if (has_fast_lrn(p.lrn) && has_pixels(p)) {
        const Chunks work = chunks_of(p);
        const int64_t threads = p.batch * work.chunks * p.pixels;
        status = with_window(p.lrn.size, [&](auto n) {
          return launch(local_response_norm_pixels_backward_kernel<T, n.value>, blocks_for(threads), 0, stream, lrn,
                        work, threads, p.batch_stride, gradient, in, out);
        });
        return;
      }
    }
    const Pixels work = pixels_of(p);
    const ChannelBlocks blocks(p.channels, p.batch * p.pixels, work.channels_first, kWindowWidths);
    status = launch(local_response_norm_backward_kernel<T>, blocks.blocks(), kBlockThreads * sizeof(Acc<T>), stream,
                    lrn, work, blocks, gradient, in, out);
  });
  return status;
}

}  // namespace alexnet_ext
