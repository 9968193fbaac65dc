// The sparse row kernel's builds: rows [begin, end) of a task on the calling thread. Each is sparse_impl.h compiled for one
// instruction set.
#pragma once
#include "divergence/sparse.h"

namespace pocl {

constexpr std::int64_t kSparseBlock = 2048;  // student's logits that are worked on at a time

/// Memory of one thread.
struct SparseScratch {
    double* s;               // [K + 1] logits of the listed entries; the rest's is its log sum exp
    double* log_p;           // [K + 1] of the outcomes, the last of them the rest
    double* log_q;           // [K + 1]
    double* gradient;        // [K + 1] tau dD/ds; the rest's is the sum over its entries
    std::int32_t* by_block;  // [K] the present entries, those of the first block first
    std::int32_t* ends;      // [blocks + 1] where each block's end in `by_block`
    float* block;            // [kSparseBlock] logits, in fp32
};

void sparse_rows_plain(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch);
void sparse_rows_avx2(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch);
void sparse_rows_avx512(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch);

}  // namespace pocl
