// The fused distillation loss on a CPU: one pass over memory gives the loss of each token, its metrics and its gradient.
// What is computed is written down in pocl_fast/loss/reference.py.
#pragma once
#include <cstdint>

#include "dense/family.h"
#include "matrix/matrix.h"
#include "simd/isa.h"

namespace pocl {

/// One value a row (stride 1) or one for all (stride 0).
struct PerRow {
    const float* data = nullptr;
    std::int64_t stride = 0;
    float operator[](std::int64_t row) const { return data[row * stride]; }
};

/// softcap * tanh(scale * x / softcap), or scale * x where softcap is 0.
struct Transform {
    float scale = 1.0f;
    float softcap = 0.0f;
    bool identity() const { return scale == 1.0f && softcap == 0.0f; }
};

struct Task {
    Matrix student;                // [N, V_s]
    Matrix teacher;                // [N, V_t]
    Matrix gradient;               // [N, V_s] in the student's dtype; data is null where no gradient is wanted. May be `student`
    const std::int64_t* labels;    // [N]
    PerRow temperature, alpha;
    PerRow row_scale;              // multiplied onto the gradient
    float* stats;                  // [kStats, N]
    Family family;
    double teacher_share;          // of the mixture of p and q, in families that have one
    int temperature_power;         // c(tau) = tau^power
    std::int64_t ignore_index;
    Transform student_transform, teacher_transform;
};

/// Computes every row on at most `threads` threads; the same bits for any number of them. Labels must be within [0, V_s).
void distillation_rows(const Task& task, Isa isa, int threads);

/// The rows' losses out of their stats, times row_scale, 0 where the label is ignored: each into `loss` [N], or `reduced` to their sum [1].
void scaled_losses(const float* stats, const std::int64_t* labels, std::int64_t N, std::int64_t ignore_index, PerRow row_scale, bool reduced,
                   float* loss);

/// The kernel's own functions on fp32 numbers, for their tests; which, see rows.h.
void vector_math(int function, const float* in, float* out, std::int64_t count, Isa isa);

}  // namespace pocl
