// The row kernel of a sparse teacher. Included once by each sparse_*.cpp, which says how wide a vector is.
//
// Two sweeps over the student's row, block by block: the normalisers, then the gradient. The listed entries are taken out of the first,
// so that the mass of the rest is a sum of its own and not a difference, in which a confident student's would drown. What lies between
// the sweeps is outcomes.h, in double.
#pragma once
#include "divergence/normalise.h"
#include "divergence/sparse_rows.h"
#include "divergence/sweeps.h"

namespace pocl {
namespace {

/// What the first sweep finds of the entries that are not listed.
struct RestFacts {
    Side q, ce;             // at temperature tau and 1
    float s_label = 0;
    float max() const { return q.max == -kInf ? 0.0f : q.max; }
};

inline Float model_logits(Float x, const Transform& transform) {
    if (transform.softcap == 0.0f) return x * transform.scale;
    return select((x == kInf) | (x == -kInf), x, transform.softcap * tanh_of(x * (transform.scale / transform.softcap)));
}

/// Logits [begin, end) as the model means them, in fp32, and their maximum. False where there is a NaN.
template <class S, bool transformed>
inline bool load_block(const typename S::Storage* row, std::int64_t begin, std::int64_t end, const Transform& transform, float* block,
                       float& largest) {
    Float top = broadcast(-kInf);
    Int nan = {};
    for_vectors(begin, end, [&](std::int64_t v, int count, auto rest) {
        Float x = load<S, rest.value>(row, v, count, -kInf);
        if constexpr (!rest.value) fetch(row + v + kSparseBlock);
        if constexpr (transformed) x = model_logits(x, transform);
        top = max(x, top);
        nan |= x != x;
        if constexpr (rest.value) store_some<F32>(block + (v - begin), x, count);
        else F32::store(block + (v - begin), x);
    });
    largest = max_lane(top);
    return !any(nan);
}

inline float largest_of(const float* block, std::int64_t count_all) {
    Float top = broadcast(-kInf);
    for_vectors(0, count_all, [&](std::int64_t v, int count, auto rest) { top = max(load<F32, rest.value>(block, v, count, -kInf), top); });
    return max_lane(top);
}

/// Adds a block, of which `largest` is the maximum, to the sums; -inf adds nothing.
template <OwnCe ce>
inline void add_block(const float* block, std::int64_t count_all, float largest, RestFacts& f) {
    double moved;
    f.q.raise(largest, moved);
    f.ce.raise(largest, moved);
    if (f.q.max == -kInf) return;  // nothing so far, and -inf - -inf would be NaN
    const Exponents exponents_q(f.q), exponents_ce(f.ce);
    const Float lowest = broadcast(-1000.0f);  // a product of 0 with it is 0
    Float q_sum = {}, x_sum = {}, ce_sum = {};
    for_vectors(0, count_all, [&](std::int64_t v, int count, auto rest) {
        const Float s = load<F32, rest.value>(block, v, count, -kInf);
        const Float x = max(lowest, exponents_q(s)), q = exp2_of(x);
        q_sum += q;
        x_sum += q * x;
        if constexpr (ce == OwnCe::at_tau_2) ce_sum += q * q;
        if constexpr (ce == OwnCe::yes) ce_sum += exp2_of(exponents_ce(s));
    });
    f.q.z += sum_lanes(q_sum);
    f.q.x_sum += sum_lanes(x_sum);
    if constexpr (ce != OwnCe::at_tau_1) f.ce.z += sum_lanes(ce_sum);
}

/// Sorts the present entries of a row by block, for `listed` to give them back.
inline void sort_by_block(const float* log_probs, const std::int64_t* indices, std::int64_t K, std::int64_t V, const SparseScratch& scratch) {
    const std::int64_t blocks = (V + kSparseBlock - 1) / kSparseBlock;
    std::int32_t* const ends = scratch.ends;
    for (std::int64_t b = 0; b <= blocks; ++b) ends[b] = 0;
    for (std::int64_t j = 0; j < K; ++j)
        if (log_probs[j] != -kInf) ++ends[indices[j] / kSparseBlock + 1];
    for (std::int64_t b = 1; b <= blocks; ++b) ends[b] += ends[b - 1];
    for (std::int64_t j = 0; j < K; ++j)  // each moves its block's beginning on, at last to where the next one's was
        if (log_probs[j] != -kInf) scratch.by_block[ends[indices[j] / kSparseBlock]++] = static_cast<std::int32_t>(j);
}

/// The first sweep. Leaves the listed entries' logits in scratch.s, -inf where one is absent.
template <class S, bool transformed, OwnCe ce>
inline void sweep(const SparseTask& task, std::int64_t n, const SparseScratch& scratch, RestFacts& f) {
    const auto* const row = static_cast<const typename S::Storage*>(task.student.data) + n * task.student.row_stride;
    const std::int64_t V = task.student.columns, label = task.labels[n];
    const std::int64_t* const indices = task.indices + n * task.K;
    for (std::int64_t j = 0; j < task.K; ++j) scratch.s[j] = -static_cast<double>(kInf);
    sort_by_block(task.log_probs + n * task.K, indices, task.K, V, scratch);
    std::int64_t at = 0;
    for (std::int64_t begin = 0, b = 0; begin < V; begin += kSparseBlock, ++b) {
        const std::int64_t end = begin + kSparseBlock < V ? begin + kSparseBlock : V;
        float* const block = scratch.block;
        float largest, largest_listed = -kInf;
        if (!load_block<S, transformed>(row, begin, end, task.transform, block, largest)) f.q.z = f.ce.z = __builtin_nan("");
        if (label >= begin && label < end) f.s_label = block[label - begin];
        for (; at < scratch.ends[b]; ++at) {
            const std::int32_t j = scratch.by_block[at];
            float& s = block[indices[j] - begin];
            scratch.s[j] = s;
            if (s > largest_listed) largest_listed = s;
            s = -kInf;
        }
        if (largest_listed == largest) largest = largest_of(block, end - begin);
        add_block<ce>(block, end - begin, largest, f);
    }
    if constexpr (ce == OwnCe::at_tau_1) f.ce = f.q;
}

// ---- the gradient -------------------------------------------------------------------------------------------------------

/// The weights of the second sweep: g = q 2^((c - max) factor) + ce 2^((c - max) log2 e), times the transform's slope.
struct RestWeights {
    float max, factor, q, ce;
    Weights transform;
};

enum class Exponentials { none, one, squares, two };  // what that takes: `one` is that of q or of ce, `squares` is tau = 2

template <class S, bool transformed, Exponentials exponentials>
inline void write_rest(const typename S::Storage* row, std::int64_t V, const Transform& transform, const RestWeights& w, const Output<S>& out) {
    const Float top = broadcast(w.max), factor = broadcast(w.factor), weight_q = broadcast(w.q), weight_ce = broadcast(w.ce);
    for_output(out, 0, V, [&](std::int64_t v, int count, auto rest) {
        Float g = {};
        if constexpr (exponentials != Exponentials::none) {
            Float c = load<S, rest.value>(row, v, count, -kInf);
            if constexpr (transformed) c = model_logits(c, transform);
            const Float q = exp2_of((c - top) * factor);
            if constexpr (exponentials == Exponentials::one) g = q * weight_q;
            if constexpr (exponentials == Exponentials::squares) g = q * (weight_q + q * weight_ce);
            if constexpr (exponentials == Exponentials::two) g = q * weight_q + exp2_of((c - top) * kLog2E) * weight_ce;
            if constexpr (transformed) g = g * w.transform.slope(c);
        }
        put<S, rest.value>(out, v, count, g);
    });
}

template <class S, bool transformed>
inline void write_rest(const typename S::Storage* row, std::int64_t V, float tau, const Transform& transform, RestWeights w, const Output<S>& out) {
    if (w.q == 0.0f && w.ce == 0.0f) return write_rest<S, transformed, Exponentials::none>(row, V, transform, w, out);
    if (w.ce != 0.0f && w.q != 0.0f && tau != 1.0f) {
        if (tau == 2.0f) return write_rest<S, transformed, Exponentials::squares>(row, V, transform, w, out);
        return write_rest<S, transformed, Exponentials::two>(row, V, transform, w, out);
    }
    if (w.q == 0.0f) w.factor = kLog2E;
    w.q += w.ce;
    write_rest<S, transformed, Exponentials::one>(row, V, transform, w, out);
}

// ---- a row --------------------------------------------------------------------------------------------------------------

template <class S, bool transformed>
inline void sparse_row(const SparseTask& task, std::int64_t n, const SparseScratch& scratch, const Output<S>& out) {
    const std::int64_t N = task.student.rows, V = task.student.columns, K = task.K, label = task.labels[n];
    const float tau = task.temperature[n], alpha = task.alpha[n];
    const float* const log_probs = task.log_probs + n * K;
    RestFacts f;
    f.q.factor = kLog2E / tau;
    f.ce.factor = kLog2E;
    if (tau == 1.0f) sweep<S, transformed, OwnCe::at_tau_1>(task, n, scratch, f);
    else if (tau == 2.0f) sweep<S, transformed, OwnCe::at_tau_2>(task, n, scratch, f);
    else sweep<S, transformed, OwnCe::yes>(task, n, scratch, f);

    const RowSums sums = compare_outcomes(task, n, {f.max(), f.q.z, f.q.x_sum, f.ce.z}, scratch);
    const bool no_softmax = sums.log_z_ce == -kInf;
    const double ce = no_softmax || f.s_label == -kInf ? kInf : sums.log_z_ce - f.s_label;
    const float c = ::powf(tau, static_cast<float>(task.temperature_power));
    const double weighted_ce = alpha == 0.0f && ce == ce ? 0.0 : alpha * ce;
    const double stats[7] = {weighted_ce + (1.0 - alpha) * c * sums.D, ce, sums.D, sums.student_entropy,
                             sums.teacher_entropy, !no_softmax && f.s_label == sums.largest ? 1.0 : 0.0, sums.agree ? 1.0 : 0.0};
    for (int k = 0; k < 7; ++k) task.stats[k * N + n] = static_cast<float>(stats[k]);
    if (out.row == nullptr) return;

    const double weight_d = static_cast<double>(task.row_scale[n]) * (1.0 - alpha) * c / tau;
    const double weight_ce = no_softmax ? 0.0 : static_cast<double>(task.row_scale[n]) * alpha;
    const Transform& t = task.transform;
    const Weights transform{0, 0, t.scale, t.softcap == 0.0f ? 0.0f : 1.0f / t.softcap};
    const auto put_one = [&](std::int64_t v, double g, double logit) {
        Float one = broadcast(static_cast<float>(g));
        if constexpr (transformed) one = one * transform.slope(broadcast(static_cast<float>(logit)));
        store_some<S>(out.row + v, one, 1);
    };
    RestWeights w{f.max(), f.q.factor, 0, 0, transform};
    double label_d = weight_d * scratch.gradient[K];
    if (f.q.z != 0) {
        w.q = static_cast<float>(label_d / f.q.z);
        w.ce = weight_ce == 0 ? 0.0f : static_cast<float>(weight_ce * sums.rest_ce / f.ce.z);
        label_d *= ::exp(f.s_label / static_cast<double>(tau) - sums.log_rest);
    }
    write_rest<S, transformed>(static_cast<const typename S::Storage*>(task.student.data) + n * task.student.row_stride, V, tau, t, w, out);
    for (std::int64_t j = 0; j < K; ++j) {
        if (log_probs[j] == -kInf) continue;
        const std::int64_t v = task.indices[n * K + j];
        const double d = weight_d * scratch.gradient[j];
        if (v == label) label_d = d;
        put_one(v, weight_ce == 0 ? d : d + weight_ce * scratch.ce[j], scratch.s[j]);
    }
    if (weight_ce != 0) put_one(label, label_d + weight_ce * ::expm1(-ce), f.s_label);  // one rounding to the gradient's dtype, not two
}

template <class S>
void sparse_rows_of(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch) {
    using Storage = typename S::Storage;
    const std::int64_t N = task.student.rows, V = task.student.columns;
    const std::int64_t row_bytes = V * static_cast<std::int64_t>(sizeof(Storage));
    // Past the caches when the gradient is too large to stay in them anyway; not over the student's own logits, which they hold.
    const bool stream = task.gradient.data != nullptr && task.gradient.data != task.student.data && row_bytes * N > (std::int64_t{16} << 20);
    for (std::int64_t n = begin; n < end; ++n) {
        Storage* const g_row =
            task.gradient.data == nullptr ? nullptr : static_cast<Storage*>(task.gradient.data) + n * task.gradient.row_stride;
        if (task.labels[n] == task.ignore_index) {
            for (int k = 0; k < 7; ++k) task.stats[k * N + n] = 0.0f;
            if (g_row != nullptr) std::memset(g_row, 0, static_cast<std::size_t>(row_bytes));
            continue;
        }
        const Output<S> out{g_row, stream};
        if (task.transform.identity()) sparse_row<S, false>(task, n, scratch, out);
        else sparse_row<S, true>(task, n, scratch, out);
    }
#if defined(__AVX2__)
    if (stream) _mm_sfence();
#endif
}

inline void sparse_rows(const SparseTask& task, std::int64_t begin, std::int64_t end, const SparseScratch& scratch) {
    switch (task.student.dtype) {
        case DType::float32: return sparse_rows_of<F32>(task, begin, end, scratch);
        case DType::bfloat16: return sparse_rows_of<BF16>(task, begin, end, scratch);
        case DType::float16: return sparse_rows_of<FP16>(task, begin, end, scratch);
    }
}

}  // namespace
}  // namespace pocl
