// CaffeNet's block on the CPU. Bytes: x is read once, and its pooled quarter is normalized while it is in the cache.
#include "../common/cpu_bias.h"
#include "../local_response_norm/local_response_norm_rows.h"
#include "../relu_max_pool2d/relu_max_pool2d_rows.h"
#include "relu_max_pool2d_lrn.h"

namespace alexnet_ext {

using namespace ALEXNET_ISA;

template <>
void relu_max_pool2d_lrn_cpu<Isa::ALEXNET_ISA>(const LrnPoolBlock& p, const void* x, const void* bias, void* y,
                                               void* pooled, uint8_t* winners, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    Buffer<A> normalized(p.out.channels * p.out.width);
    LrnRows<A> lrn(p.lrn, p.out.channels, p.out.width, p.out.channels_last);
    PoolRows<A, true> pool(p.pool, p.in, p.out.width, p.in.channels);
    for (int64_t unit = begin; unit < end; ++unit) {
      Band band = band_of(p.out, unit);
      pool.run(
          band.first, band.last,
          [&](int64_t ih, A* row) {
            load_row(row, static_cast<const T*>(x), row_place(p.in, band.image, 0, p.in.channels, ih));
            add_bias(row, static_cast<const T*>(bias), p.in);
            return row;
          },
          [&](int64_t oh, const A* row, const uint8_t* taps) {
            RowPlace place = row_place(p.out, band.image, 0, p.out.channels, oh);
            lrn.forward(row, normalized, p.out.width);
            store_row<T>(static_cast<T*>(y), normalized, place);
            store_row<T>(static_cast<T*>(pooled), row, place);
            store_row(winners, taps, place);
          });
    }
  });
}

template <>
void relu_max_pool2d_lrn_backward_cpu<Isa::ALEXNET_ISA>(const LrnPoolBlock& p, const void* dy, const void* pooled,
                                                        const uint8_t* winners, void* dx, void* bias_sums,
                                                        int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const int64_t row_size = p.out.channels * p.out.width;
    Buffer<A> activation(row_size), gradient(row_size), sums(p.in.channels);
    LrnRows<A> lrn(p.lrn, p.out.channels, p.out.width, p.out.channels_last);
    UnpoolRows<A> pool(p.pool, p.in, p.out, p.in.channels);
    for (int64_t unit = begin; unit < end; ++unit) {
      Band band = band_of(p.in, unit);
      std::memset(sums, 0, p.in.channels * sizeof(A));
      pool.run(
          band.first, band.last,
          [&](int64_t oh, A* dpooled, uint8_t* taps) {
            RowPlace place = row_place(p.out, band.image, 0, p.out.channels, oh);
            load_row(activation, static_cast<const T*>(pooled), place);
            load_row(gradient, static_cast<const T*>(dy), place);
            load_row(taps, winners, place);
            lrn.backward(activation, gradient, dpooled, p.out.width);
          },
          [&](int64_t ih, A* row, auto&& gather) {
            gather(row);
            add_channel_sums<A>(sums, row, p.in);
            store_row(static_cast<T*>(dx), row, row_place(p.in, band.image, 0, p.in.channels, ih));
          });
      std::memcpy(static_cast<A*>(bias_sums) + unit * p.in.channels, sums, p.in.channels * sizeof(A));
    }
  });
}

}  // namespace alexnet_ext
