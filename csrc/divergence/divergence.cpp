#include "divergence/divergence.h"

#include "divergence/rows.h"
#include "parallel/parallel.h"

namespace pocl {

bool supports(Isa isa) noexcept {
    if (isa == Isa::plain) return true;
#if defined(__x86_64__)
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

Isa best_isa() noexcept {
    return supports(Isa::avx512) ? Isa::avx512 : supports(Isa::avx2) ? Isa::avx2 : Isa::plain;
}

void distillation_rows(const Task& task, Isa isa, int threads) {
    auto* rows = &rows_plain;
#if defined(__x86_64__)
    if (isa == Isa::avx512) rows = &rows_avx512;
    if (isa == Isa::avx2) rows = &rows_avx2;
#else
    (void)isa;
#endif
    parallel_for(task.student.rows, 1, threads, [&](std::int64_t begin, std::int64_t end) { rows(task, begin, end); });
}

}  // namespace pocl
