#include "simd/isa.h"

namespace pocl {

bool supports(Isa isa) noexcept {
    if (isa == Isa::plain) return true;
#if defined(__x86_64__)
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

Isa best_isa() noexcept {
    return supports(Isa::avx512) ? Isa::avx512 : supports(Isa::avx2) ? Isa::avx2 : Isa::plain;
}

}  // namespace pocl
