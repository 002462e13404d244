// ReLU + max pooling on the CPU. Bytes: forward reads x once and writes y and one byte a window; backward reads these
// bytes and dy once and writes dx once.
#include "relu_max_pool2d_rows.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

// A unit of work: rows [first, last) of `channels` channels of an image.
struct Piece {
  int64_t image, channel, channels, first, last;
};

Piece piece_of(const Images& s, int64_t unit) {
  if (!s.channels_last) {
    int64_t groups = ceil_div(s.channels, kPlanes), first = unit % groups * kPlanes, left = s.channels - first;
    return {unit / groups, first, left < kPlanes ? left : kPlanes, 0, s.height};
  }
  Band band = band_of(s, unit);
  return {band.image, 0, s.channels, band.first, band.last};
}

// Whether rows can be used in place, without scratch memory: vectors of A end exactly at the end of a row.
template <class A>
bool whole_vectors(const Images& s) {
  return s.channels_last && s.channels % kLanes<A> == 0;
}

int64_t channels_at_once(const Images& s) { return s.channels_last || s.channels < kPlanes ? s.channels : kPlanes; }

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void relu_max_pool2d_cpu<Isa::ALEXNET_ISA>(const ReluMaxPool2d& p, const void* x, void* y, uint8_t* winners,
                                           int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    PoolRows<A, true> rows(p.pool, p.in, p.out.width, channels_at_once(p.in));
    for (int64_t unit = begin; unit < end; ++unit) {
      Piece at = piece_of(p.out, unit);
      rows.run(
          at.first, at.last,
          [&](int64_t row, A* in) -> const A* {
            RowPlace place = row_place(p.in, at.image, at.channel, at.channels, row);
            if constexpr (std::is_same_v<T, A>)
              if (whole_vectors<A>(p.in)) return static_cast<const A*>(x) + place.offset;
            load_row(in, static_cast<const T*>(x), place);
            return in;
          },
          [&](int64_t row, const A* out, const uint8_t* taps) {
            RowPlace place = row_place(p.out, at.image, at.channel, at.channels, row);
            store_row(static_cast<T*>(y), out, place);
            store_row(winners, taps, place);
          });
    }
  });
}

template <>
void relu_max_pool2d_backward_cpu<Isa::ALEXNET_ISA>(const ReluMaxPool2d& p, const void* dy, const uint8_t* winners,
                                                    void* dx, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    UnpoolRows<A> rows(p.pool, p.in, p.out, channels_at_once(p.in));
    for (int64_t unit = begin; unit < end; ++unit) {
      Piece at = piece_of(p.in, unit);
      rows.run(
          at.first, at.last,
          [&](int64_t row, A* gradient, uint8_t* taps) {
            RowPlace place = row_place(p.out, at.image, at.channel, at.channels, row);
            load_row(gradient, static_cast<const T*>(dy), place);
            load_row(taps, winners, place);
          },
          [&](int64_t row, A* scratch, auto&& gather) {
            RowPlace place = row_place(p.in, at.image, at.channel, at.channels, row);
            if constexpr (std::is_same_v<T, A>)
              if (whole_vectors<A>(p.in)) return gather(static_cast<A*>(dx) + place.offset);
            gather(scratch);
            store_row(static_cast<T*>(dx), scratch, place);
          });
    }
  });
}

}  // namespace alexnet_ext
