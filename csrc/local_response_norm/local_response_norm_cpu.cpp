// LRN on the CPU, a tile of pixels with all its channels at a time. Bytes: each tile is read once and written once.
#include "local_response_norm_rows.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

struct Tile {
  int64_t offset, pixels;
};

Tile tile_of(const LocalResponseNorm& p, int64_t unit) {
  int64_t tiles = ceil_div(p.pixels, kLrnTile), first = unit % tiles * kLrnTile;
  int64_t left = p.pixels - first;
  return {unit / tiles * p.batch_stride + first * p.pixel_stride, left < kLrnTile ? left : kLrnTile};
}

// A channels-last tile is one run of memory. Others are, for each channel, a run or strided elements.
bool dense_channels(const LocalResponseNorm& p) {
  return p.channel_stride == 1 && p.pixel_stride == p.channels && p.channels > 1;
}

template <class T, class Move>
void move_tile(const LocalResponseNorm& p, int64_t pixels, Move&& move_run) {
  if (dense_channels(p)) return move_run(0, 0, pixels * p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    if (p.pixel_stride == 1) {
      move_run(c * pixels, c * p.channel_stride, pixels);
    } else {
      for (int64_t i = 0; i < pixels; ++i) move_run(c * pixels + i, c * p.channel_stride + i * p.pixel_stride, 1);
    }
  }
}

template <class T>
void load_tile(const LocalResponseNorm& p, Acc<T>* tile, const T* from, int64_t pixels) {
  move_tile<T>(p, pixels, [&](int64_t at, int64_t offset, int64_t n) { load_row(tile + at, from + offset, n); });
}

template <class T>
void store_tile(const LocalResponseNorm& p, T* to, const Acc<T>* tile, int64_t pixels) {
  move_tile<T>(p, pixels, [&](int64_t at, int64_t offset, int64_t n) { store_row(to + offset, tile + at, n); });
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void local_response_norm_cpu<Isa::ALEXNET_ISA>(const LocalResponseNorm& p, const void* x, void* y, int64_t begin,
                                               int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    Buffer<A> in(p.channels * kLrnTile), out(p.channels * kLrnTile);
    LrnRows<A> rows(p.lrn, p.channels, kLrnTile, dense_channels(p));
    for (int64_t unit = begin; unit < end; ++unit) {
      Tile tile = tile_of(p, unit);
      load_tile<T>(p, in, static_cast<const T*>(x) + tile.offset, tile.pixels);
      rows.forward(in, out, tile.pixels);
      store_tile<T>(p, static_cast<T*>(y) + tile.offset, out, tile.pixels);
    }
  });
}

template <>
void local_response_norm_backward_cpu<Isa::ALEXNET_ISA>(const LocalResponseNorm& p, const void* dy, const void* x,
                                                        void* dx, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    Buffer<A> in(p.channels * kLrnTile), gradient(p.channels * kLrnTile), out(p.channels * kLrnTile);
    LrnRows<A> rows(p.lrn, p.channels, kLrnTile, dense_channels(p));
    for (int64_t unit = begin; unit < end; ++unit) {
      Tile tile = tile_of(p, unit);
      load_tile<T>(p, in, static_cast<const T*>(x) + tile.offset, tile.pixels);
      load_tile<T>(p, gradient, static_cast<const T*>(dy) + tile.offset, tile.pixels);
      rows.backward(in, gradient, out, tile.pixels);
      store_tile<T>(p, static_cast<T*>(dx) + tile.offset, out, tile.pixels);
    }
  });
}

}  // namespace alexnet_ext
