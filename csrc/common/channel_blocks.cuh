// Blocks of threads over channels and pixels, where a thread stays at its channel: for sums over the pixels, and for
// what the threads of neighbouring channels share.
#pragma once

#include "images.cuh"

namespace alexnet_ext {

// How many channels a block has at most: where pixels lie side by side in memory, and where channels do.
struct ChannelWidths {
  int contiguous, channels_last;
};

// A block has `width` neighbouring channels of each of `height` pixels, those that are neighbours in memory side by
// side. Blocks of [rows][groups of channels]; a row takes every rows-th run of pixels.
struct ChannelBlocks {
  int64_t pixels, rows;  // pixels of all images
  int width, height;     // powers of two
  bool channels_first;   // in memory the channel moves slower than the pixel
  Divisor by_groups;

  // Rows for one turn each, up to kMaxBlocks.
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

// This thread's place: thread lane * channel_step + pixel * pixel_step of its block.
struct ChannelPlace {
  int64_t row;
  int lane, pixel, channel_step, pixel_step;
  int channel;  // the last group's may lie beyond the channels

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

// f(pixel, whether there is one) for this thread's pixels, as often for all threads of a block; else it is pixel 0.
template <class F>
__device__ inline void for_pixels(const ChannelBlocks& work, F&& f) {
  const ChannelPlace own(work);
  for (int64_t start = own.row * work.height; start < work.pixels; start += work.rows * work.height) {
    const bool inside = start + own.pixel < work.pixels;
    f(inside ? start + own.pixel : 0, inside);
  }
}

}  // namespace alexnet_ext
