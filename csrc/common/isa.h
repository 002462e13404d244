// Each CPU kernel source is compiled once for each instruction set. At run time the best one of this CPU is chosen.
#pragma once

#include <type_traits>

namespace alexnet_ext {

enum class Isa { portable, avx2, avx512 };

// The widest instruction set of this CPU that PyTorch's variable ATEN_CPU_CAPABILITY allows.
Isa best_isa();

const char* isa_name(Isa isa);

// Calls f(constant) with the instruction set as a compile-time constant.
template <class F>
inline auto with_isa(Isa isa, F&& f) {
#if defined(ALEXNET_X86)
  if (isa == Isa::avx512) return f(std::integral_constant<Isa, Isa::avx512>{});
  if (isa == Isa::avx2) return f(std::integral_constant<Isa, Isa::avx2>{});
#endif
  return f(std::integral_constant<Isa, Isa::portable>{});
}

}  // namespace alexnet_ext
