#define POCL_VECTOR_BYTES 64
#include "dense/rows_impl.h"

namespace pocl {
void rows_avx512(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) { rows(task, begin, end, scratch); }
void math_avx512(int function, const float* in, float* out, std::int64_t count) { math(function, in, out, count); }
}  // namespace pocl
