#include "divergence/divergence.h"

#include <algorithm>
#include <memory>

#include "divergence/rows.h"
#include "parallel/parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pocl {
namespace {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

std::int64_t bytes_per_element(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

/// Asks the kernel for huge pages under a fresh gradient: taken in by 4 KiB, it costs more time than the loss itself. Advice only.
void advise_huge_pages([[maybe_unused]] const Matrix& gradient) {
#ifdef __linux__
    const std::int64_t bytes = gradient.rows * gradient.row_stride * bytes_per_element(gradient.dtype);
    if (gradient.data == nullptr || bytes < 2 * kHugePage) return;
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(gradient.data);
    const std::uintptr_t first = (begin + page - 1) / page * page, end = (begin + static_cast<std::uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

/// Memory of the calling thread's own, kept for its next rows.
float* thread_scratch(std::int64_t size) {
    thread_local std::unique_ptr<float[]> scratch;
    thread_local std::int64_t held = 0;
    if (held < size) {
        scratch.reset(new float[static_cast<std::size_t>(size)]);
        held = size;
    }
    return scratch.get();
}

}  // namespace

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

void vector_math(int function, const float* in, float* out, std::int64_t count, Isa isa) {
    auto* math = &math_plain;
#if defined(__x86_64__)
    if (isa == Isa::avx512) math = &math_avx512;
    if (isa == Isa::avx2) math = &math_avx2;
#else
    (void)isa;
#endif
    math(function, in, out, count);
}

void distillation_rows(const Task& task, Isa isa, int threads) {
    auto* rows = &rows_plain;
#if defined(__x86_64__)
    if (isa == Isa::avx512) rows = &rows_avx512;
    if (isa == Isa::avx2) rows = &rows_avx2;
#else
    (void)isa;
#endif
    advise_huge_pages(task.gradient);
    // a thread takes neighbouring rows, so that two of them seldom wait for the same fresh page; yet enough pieces for all
    const std::int64_t row_bytes = std::max<std::int64_t>(1, task.student.columns * bytes_per_element(task.student.dtype));
    const std::int64_t grain = std::min(kHugePage / row_bytes, task.student.rows / (8 * std::max(threads, 1)));
    parallel_for(task.student.rows, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        rows(task, begin, end, thread_scratch(scratch_size(task)));
    });
}

}  // namespace pocl
