#define POCL_VECTOR_BYTES 16
#include "sparse/sparse_impl.h"

namespace pocl {
void sparse_rows_plain(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch) {
    sparse_rows(task, begin, end, scratch);
}
}  // namespace pocl
