#define POCL_VECTOR_BYTES 64
#include "divergence/rows_impl.h"

namespace pocl {
void rows_avx512(const Task& task, std::int64_t begin, std::int64_t end) { rows(task, begin, end); }
}  // namespace pocl
