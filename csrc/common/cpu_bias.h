// A per-channel bias, added to rows in scratch memory: [channels][width] or, channels-last, [width][channels].
#pragma once

#include "cpu_vector.h"

namespace alexnet_ext::ALEXNET_ISA {

// row += bias; a null bias adds nothing.
template <class T>
inline void add_bias(Acc<T>* __restrict row, const T* __restrict bias, const Images& s) {
  if (bias == nullptr) return;
  if (s.channels_last) {
    for (int64_t j = 0; j < s.width; ++j)
      for (int64_t i = 0; i < s.channels; ++i) row[j * s.channels + i] += widen(bias[i]);
    return;
  }
  for (int64_t i = 0; i < s.channels; ++i) {
    const Acc<T> b = widen(bias[i]);
    for (int64_t j = 0; j < s.width; ++j) row[i * s.width + j] += b;
  }
}

// sums[channel] += the row's values of that channel, in one fixed order.
template <class A>
inline void add_channel_sums(A* __restrict sums, const A* __restrict row, const Images& s) {
  if (s.channels_last) {
    for (int64_t j = 0; j < s.width; ++j)
      for (int64_t i = 0; i < s.channels; ++i) sums[i] += row[j * s.channels + i];
    return;
  }
  for (int64_t i = 0; i < s.channels; ++i) {
    const A* values = row + i * s.width;
    Vec<A> wide{};
    int64_t j = 0;
    for (; j + kLanes<A> <= s.width; j += kLanes<A>) wide += load(values + j);
    A sum = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) sum += wide[lane];
    for (; j < s.width; ++j) sum += values[j];
    sums[i] += sum;
  }
}

}  // namespace alexnet_ext::ALEXNET_ISA
