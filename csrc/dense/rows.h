// The row kernel's builds: rows [begin, end) of a task on the calling thread. Each is rows_impl.h compiled for one instruction set.
#pragma once
#include <algorithm>

#include "dense/dense.h"

namespace pocl {

/// Rows that a thread takes at a time: neighbours, of 8 MiB at most, so that two threads seldom wait for the same fresh page and most
/// gradients are written while the next row is read; yet enough pieces for all threads, and none so small that it does not pay to wake
/// one (32768 logits). 0 where that is less than a row.
inline std::int64_t rows_of_a_piece(const Matrix& student, int threads) {
    const std::int64_t columns = std::max<std::int64_t>(1, student.columns);
    const std::int64_t most = (std::int64_t{8} << 20) / (columns * (student.dtype == DType::float32 ? 4 : 2));
    return std::max(32768 / columns, std::min(most, student.rows / (8 * std::max(threads, 1))));
}

/// fp32 numbers in each array of a thread's scratch, whole vectors of any build, and those for a number a block.
inline std::int64_t scratch_array(std::int64_t V) { return (V + 15) / 16 * 16 + 128; }  // not a multiple of the pages, which would meet in the caches
inline std::int64_t scratch_blocks(std::int64_t V) { return (V / 512 + 2 + 15) / 16 * 16; }

/// fp32 numbers of scratch that a thread needs, aligned to 64 bytes: see rows_impl.h. Only the pages that a task does use are ever touched.
inline std::int64_t scratch_size(const Task& task) {
    return 6 * scratch_array(task.student.columns) + 2 * scratch_blocks(task.student.columns);
}

void rows_plain(const Task& task, std::int64_t begin, std::int64_t end, float* scratch);
void rows_avx2(const Task& task, std::int64_t begin, std::int64_t end, float* scratch);
void rows_avx512(const Task& task, std::int64_t begin, std::int64_t end, float* scratch);

/// The vector functions, elementwise, for their test: 0 is 2^x, 1 is 2^x - 1 (x <= 0), 2 is log(1 + x), 3 is tanh(x),
/// 4 is log2(x) (x > 0, normal), 5 is 2^(x * fp32's log2(e)) (x <= 0).
void math_plain(int function, const float* in, float* out, std::int64_t count);
void math_avx2(int function, const float* in, float* out, std::int64_t count);
void math_avx512(int function, const float* in, float* out, std::int64_t count);

}  // namespace pocl
