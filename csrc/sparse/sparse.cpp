#include "sparse/sparse.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "dense/rows.h"
#include "sparse/sparse_rows.h"
#include "parallel/parallel.h"

namespace pocl {
namespace {

constexpr std::size_t kLine = 16;                    // fp32 numbers in a cache line

/// The calling thread's own, kept for its next rows. Only the pages that a task does use are ever touched.
SparseScratch thread_scratch(std::int64_t K, std::int64_t V) {
    thread_local std::vector<double> doubles;
    thread_local std::vector<std::int32_t> integers;
    thread_local std::unique_ptr<float[]> floats;
    thread_local std::size_t held = 0;
    const auto k = static_cast<std::size_t>(K) + 1, array = static_cast<std::size_t>(scratch_array(V));
    const auto blocks = static_cast<std::size_t>(scratch_blocks(V));
    if (doubles.size() < 7 * k) doubles.resize(7 * k);
    if (integers.size() < k + blocks + 1) integers.resize(k + blocks + 1);
    std::size_t size = 2 * array + blocks + kLine;
    if (held < size) {
        floats.reset(new float[size]);
        held = size;
    }
    void* memory = floats.get();
    size *= sizeof(float);
    auto* const f = static_cast<float*>(std::align(kLine * sizeof(float), 1, memory, size));
    double* const d = doubles.data();
    std::int32_t* const i = integers.data();
    return {d, d + k, d + 2 * k, d + 3 * k, d + 4 * k, d + 5 * k, d + 6 * k, i, i + k, f, f + array, f + 2 * array};
}

}  // namespace

std::int64_t first_index_outside(const SparseTask& task) noexcept {
    for (std::int64_t n = 0; n < task.student.rows; ++n) {
        if (task.labels[n] == task.ignore_index) continue;
        for (std::int64_t at = n * task.K; at < (n + 1) * task.K; ++at) {
            const bool inside = task.indices[at] >= 0 && task.indices[at] < task.student.columns;
            if (!inside && task.log_probs[at] != -std::numeric_limits<float>::infinity()) return at;
        }
    }
    return -1;
}

void sparse_distillation_rows(const SparseTask& task, Isa isa, int threads) {
    auto* rows = &sparse_rows_plain;
#if defined(__x86_64__)
    if (isa == Isa::avx512) rows = &sparse_rows_avx512;
    if (isa == Isa::avx2) rows = &sparse_rows_avx2;
#else
    (void)isa;
#endif
    parallel_for(task.student.rows, rows_of_a_piece(task.student, threads), threads, [&](std::int64_t begin, std::int64_t end) {
        rows(task, begin, end, thread_scratch(task.K, task.student.columns));
    });
}

}  // namespace pocl
