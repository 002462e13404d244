// CUTLASS's type for each element type.
#pragma once

#include <cutlass/numeric_types.h>

#include "../common/types.h"

namespace alexnet_ext {

template <class T>
struct CutlassElement {
  using Type = T;
};
template <>
struct CutlassElement<bf16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct CutlassElement<f16> {
  using Type = cutlass::half_t;
};
template <class T>
using Element = typename CutlassElement<T>::Type;

}  // namespace alexnet_ext
