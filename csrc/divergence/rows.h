// The row kernel's builds: rows [begin, end) of a task on the calling thread. Each is rows_impl.h compiled for one instruction set.
#pragma once
#include "divergence/divergence.h"

namespace pocl {

void rows_plain(const Task& task, std::int64_t begin, std::int64_t end);
void rows_avx2(const Task& task, std::int64_t begin, std::int64_t end);
void rows_avx512(const Task& task, std::int64_t begin, std::int64_t end);

}  // namespace pocl
