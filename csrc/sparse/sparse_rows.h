// The sparse row kernel's builds: rows [begin, end) of a task on the calling thread. Each is sparse_impl.h compiled for one
// instruction set.
#pragma once
#include "sparse/outcomes.h"

namespace pocl {

void sparse_rows_plain(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch);
void sparse_rows_avx2(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch);
void sparse_rows_avx512(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch);

}  // namespace pocl
