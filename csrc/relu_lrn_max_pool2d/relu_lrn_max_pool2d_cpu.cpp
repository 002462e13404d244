// The paper's block on the CPU: rows of x go through bias, ReLU and LRN into scratch memory and are pooled from there.
// Bytes: x is read once, and only the pooled quarter is written.
#include "../common/cpu_bias.h"
#include "../local_response_norm/local_response_norm_rows.h"
#include "../relu_max_pool2d/relu_max_pool2d_rows.h"
#include "relu_lrn_max_pool2d.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

// The test is v <= 0 so that NaN passes.
template <class A>
void relu(A* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] <= 0 ? A(0) : row[i];
}

template <class A>
void mask(A* __restrict gradient, const A* __restrict activation, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gradient[i] = activation[i] <= 0 ? A(0) : gradient[i];
}

template <class T>
void load_activation(const LrnPoolBlock& p, Acc<T>* row, const void* x, const void* bias, int64_t image, int64_t ih) {
  load_row(row, static_cast<const T*>(x), row_place(p.in, image, 0, p.in.channels, ih));
  add_bias(row, static_cast<const T*>(bias), p.in);
  relu(row, p.in.channels * p.in.width);
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void relu_lrn_max_pool2d_cpu<Isa::ALEXNET_ISA>(const LrnPoolBlock& p, const void* x, const void* bias, void* y,
                                               uint8_t* winners, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    Buffer<A> activation(p.in.channels * p.in.width);
    LrnRows<A> lrn(p.lrn, p.in.channels, p.in.width, p.in.channels_last);
    PoolRows<A, false> pool(p.pool, p.in, p.out.width, p.in.channels);
    for (int64_t unit = begin; unit < end; ++unit) {
      Band band = band_of(p.out, unit);
      pool.run(
          band.first, band.last,
          [&](int64_t ih, A* normalized) {
            load_activation<T>(p, activation, x, bias, band.image, ih);
            lrn.forward(activation, normalized, p.in.width);
            return normalized;
          },
          [&](int64_t oh, const A* pooled, const uint8_t* taps) {
            RowPlace place = row_place(p.out, band.image, 0, p.in.channels, oh);
            store_row(static_cast<T*>(y), pooled, place);
            store_row(winners, taps, place);
          });
    }
  });
}

template <>
void relu_lrn_max_pool2d_backward_cpu<Isa::ALEXNET_ISA>(const LrnPoolBlock& p, const void* dy, const void* x,
                                                        const void* bias, const uint8_t* winners, void* dx,
                                                        void* bias_sums, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const int64_t row_size = p.in.channels * p.in.width;
    Buffer<A> activation(row_size), gradient(row_size), sums(p.in.channels);
    LrnRows<A> lrn(p.lrn, p.in.channels, p.in.width, p.in.channels_last);
    UnpoolRows<A> pool(p.pool, p.in, p.out, p.in.channels);
    for (int64_t unit = begin; unit < end; ++unit) {
      Band band = band_of(p.in, unit);
      std::memset(sums, 0, p.in.channels * sizeof(A));
      pool.run(
          band.first, band.last,
          [&](int64_t oh, A* pooled, uint8_t* taps) {
            RowPlace place = row_place(p.out, band.image, 0, p.in.channels, oh);
            load_row(pooled, static_cast<const T*>(dy), place);
            load_row(taps, winners, place);
          },
          [&](int64_t ih, A* normalized, auto&& gather) {
            gather(normalized);
            load_activation<T>(p, activation, x, bias, band.image, ih);
            lrn.backward(activation, normalized, gradient, p.in.width);
            mask<A>(gradient, activation, row_size);
            add_channel_sums<A>(sums, gradient, p.in);
            store_row(static_cast<T*>(dx), gradient, row_place(p.in, band.image, 0, p.in.channels, ih));
          });
      std::memcpy(static_cast<A*>(bias_sums) + unit * p.in.channels, sums, p.in.channels * sizeof(A));
    }
  });
}

}  // namespace alexnet_ext
