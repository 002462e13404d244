// Thread blocks over channels and pixels. Each thread keeps one channel, so that it can sum over pixels and share
// values with the threads of neighbouring channels.
#pragma once

#include "images.cuh"

namespace alexnet_ext {

// The most channels of a block, for images that are contiguous and for those that are channels-last.
struct ChannelWidths {
  int contiguous, channels_last;
};

// A block has `width` neighbouring channels of each of `height` pixels. Adjacent threads take adjacent memory. The grid
// is [rows][groups of channels], and a row takes every rows-th run of pixels.
struct ChannelBlocks {
  int64_t pixels, rows;  // of all images
  int width, height;     // powers of two
  bool channels_first;   // in memory the channel varies more slowly than the pixel
  Divisor by_groups;

  // As many rows as give each one turn, at most about kMaxBlocks blocks.
  ChannelBlocks(int64_t channels, int64_t pixel_count, bool first, const ChannelWidths& most)
      : pixels(pixel_count), width(1), channels_first(first), by_groups(1) {
    while (width < (first ? most.contiguous : most.channels_last) && width < channels) width *= 2;
    height = kBlockThreads / width;
    by_groups = Divisor(channels > width ? ceil_div(channels, width) : 1);
    const int64_t turns = ceil_div(pixels, height), limit = kMaxBlocks / by_groups.value + 1;
    rows = turns < limit ? turns : limit;
  }

  ChannelBlocks(const Images& s, const ChannelWidths& most)
      : ChannelBlocks(s.channels, s.batch * s.height * s.width, !s.channels_last, most) {}

  ChannelBlocks(const Images& s, const ChannelWidths& most, int64_t row_count) : ChannelBlocks(s, most) {
    rows = row_count;
  }

  int64_t blocks() const { return rows * by_groups.value; }
};

// This thread's channel and pixel in its block: the thread number is lane * channel_step + pixel * pixel_step.
struct ChannelPlace {
  int64_t row;
  int lane, pixel, channel_step, pixel_step;
  int channel;  // in the last group it may be past the end

  __device__ explicit ChannelPlace(const ChannelBlocks& work)
      : row(work.by_groups.divide(blockIdx.x)),
        channel_step(work.channels_first ? work.height : 1),
        pixel_step(work.channels_first ? 1 : work.width) {
    const int thread = static_cast<int>(threadIdx.x);
    lane = work.channels_first ? thread / work.height : thread % work.width;
    pixel = work.channels_first ? thread % work.height : thread / work.width;
    channel = static_cast<int>(blockIdx.x - row * work.by_groups.value) * work.width + lane;
  }
};

// Calls f(pixel, inside) for this thread's pixels, equally often in every thread of the block. Past the last pixel,
// inside is false and pixel is 0.
template <class F>
__device__ inline void for_pixels(const ChannelBlocks& work, F&& f) {
  const ChannelPlace own(work);
  for (int64_t start = own.row * work.height; start < work.pixels; start += work.rows * work.height) {
    const bool inside = start + own.pixel < work.pixels;
    f(inside ? start + own.pixel : 0, inside);
  }
}

}  // namespace alexnet_ext
