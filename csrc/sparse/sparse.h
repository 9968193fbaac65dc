// The fused distillation loss against a teacher of which K entries a token are known: reads K numbers of it, not V.
// What is computed is `sparse_distillation_rows` of pocl_fast/loss/reference.py.
#pragma once
#include "dense/dense.h"

namespace pocl {

/// What D makes of the entries that are not listed: nothing, or one more outcome.
enum class Tail { renormalise, bucket };

struct SparseTask {
    Matrix student;                 // [N, V]
    Matrix gradient;                // [N, V] in the student's dtype; data is null where no gradient is wanted. May be `student`
    const float* log_probs;         // [N, K], at temperature 1; -inf: no entry
    const std::int64_t* indices;    // [N, K], distinct in a row; not looked at where log_probs is -inf
    std::int64_t K;
    const std::int64_t* labels;     // [N]
    PerRow temperature, alpha;
    PerRow row_scale;               // multiplied onto the gradient
    float* stats;                   // [kStats, N]
    Family family;
    double teacher_share;
    int temperature_power;
    std::int64_t ignore_index;
    Tail tail;
    Transform transform;            // the student's
};

/// The place in `indices` of the first that is outside [0, V) and would be read, or -1.
std::int64_t first_index_outside(const SparseTask& task) noexcept;

/// Computes every row on at most `threads` threads; the same bits for any number of them. Labels and indices must be within [0, V).
void sparse_distillation_rows(const SparseTask& task, Isa isa, int threads);

}  // namespace pocl
