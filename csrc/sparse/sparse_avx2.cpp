#define POCL_VECTOR_BYTES 32
#include "sparse/sparse_impl.h"

namespace pocl {
void sparse_rows_avx2(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch) {
    sparse_rows(task, begin, end, scratch);
}
}  // namespace pocl
