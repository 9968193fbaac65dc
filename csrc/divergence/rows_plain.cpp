#define POCL_VECTOR_BYTES 16
#include "divergence/rows_impl.h"

namespace pocl {
void rows_plain(const Task& task, std::int64_t begin, std::int64_t end) { rows(task, begin, end); }
}  // namespace pocl
