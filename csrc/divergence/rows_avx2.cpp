#define POCL_VECTOR_BYTES 32
#include "divergence/rows_impl.h"

namespace pocl {
void rows_avx2(const Task& task, std::int64_t begin, std::int64_t end) { rows(task, begin, end); }
}  // namespace pocl
