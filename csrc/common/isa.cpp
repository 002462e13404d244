#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace alexnet_ext {

Isa best_isa() {
#if defined(ALEXNET_X86)
  static const Isa best = [] {
    const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
    auto allows = [&](const char* name) { return cap == nullptr || std::strcmp(cap, name) == 0; };
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && allows("avx512")) return Isa::avx512;
    if (avx2 && (allows("avx2") || allows("avx512"))) return Isa::avx2;
    return Isa::portable;
  }();
  return best;
#else
  return Isa::portable;
#endif
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "AVX512" : isa == Isa::avx2 ? "AVX2" : "DEFAULT"; }

}  // namespace alexnet_ext
