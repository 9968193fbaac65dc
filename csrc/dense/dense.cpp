#include "dense/dense.h"

#include <algorithm>
#include <memory>
#include <new>

#include "dense/rows.h"
#include "parallel/parallel.h"

namespace pocl {
namespace {

constexpr std::align_val_t kCacheLine{64};

/// Memory of the calling thread's own, on cache lines, kept for its next rows.
float* thread_scratch(std::int64_t size) {
    struct Free {
        void operator()(float* memory) const { ::operator delete[](memory, kCacheLine); }
    };
    thread_local std::unique_ptr<float[], Free> scratch;
    thread_local std::int64_t held = 0;
    if (held < size) {
        scratch.reset(static_cast<float*>(::operator new[](static_cast<std::size_t>(size) * sizeof(float), kCacheLine)));
        held = size;
    }
    return scratch.get();
}

}  // namespace

void scaled_losses(const float* stats, const std::int64_t* labels, std::int64_t N, std::int64_t ignore_index, PerRow row_scale, bool reduced,
                   float* loss) {
    double sum = 0;
    for (std::int64_t n = 0; n < N; ++n) {
        const float scaled = labels[n] == ignore_index ? 0.0f : stats[n] * row_scale[n];
        sum += scaled;
        if (!reduced) loss[n] = scaled;
    }
    if (reduced) *loss = static_cast<float>(sum);
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
    parallel_for(task.student.rows, rows_of_a_piece(task.student, threads), threads, [&](std::int64_t begin, std::int64_t end) {
        rows(task, begin, end, thread_scratch(scratch_size(task)));
    });
}

}  // namespace pocl
