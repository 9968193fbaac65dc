// The row kernel's builds: rows [begin, end) of a task on the calling thread. Each is rows_impl.h compiled for one instruction set.
#pragma once
#include "divergence/divergence.h"

namespace pocl {

/// fp32 numbers of scratch that a thread needs: a mixture's u, and copies of a row that cannot be swept where it lies. Only the pages
/// that a task does use are ever touched.
inline std::int64_t scratch_size(const Task& task) { return 4 * task.student.columns; }

void rows_plain(const Task& task, std::int64_t begin, std::int64_t end, float* scratch);
void rows_avx2(const Task& task, std::int64_t begin, std::int64_t end, float* scratch);
void rows_avx512(const Task& task, std::int64_t begin, std::int64_t end, float* scratch);

/// The vector functions, elementwise, for their test: 0 is 2^x, 1 is 2^x - 1 (x <= 0), 2 is log(1 + x), 3 is tanh(x).
void math_plain(int function, const float* in, float* out, std::int64_t count);
void math_avx2(int function, const float* in, float* out, std::int64_t count);
void math_avx512(int function, const float* in, float* out, std::int64_t count);

}  // namespace pocl
