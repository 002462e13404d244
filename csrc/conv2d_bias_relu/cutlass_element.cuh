// CUTLASS's name of an element, the same bits as ours.
#pragma once

#include <cutlass/numeric_types.h>

#include <type_traits>

#include "../common/types.h"

namespace alexnet_ext {

template <class T>
using CutlassElement = std::conditional_t<std::is_same_v<T, bf16>, cutlass::bfloat16_t,
                                          std::conditional_t<std::is_same_v<T, f16>, cutlass::half_t, float>>;

}  // namespace alexnet_ext
