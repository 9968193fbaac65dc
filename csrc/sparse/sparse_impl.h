// The row kernel of a sparse teacher. Included once by each sparse_*.cpp, which says how wide a vector is.
//
// Two sweeps over the student's row, block by block: the normalisers, which keep the exponentials, then the gradient. The listed entries
// are taken out of the first, so that the mass of the rest is a sum of its own and not a difference, in which a confident student's
// would drown. What lies between the sweeps is outcomes.h, in double.
#pragma once
#include "sparse/sparse_rows.h"
#include "dense/gradient.h"

namespace pocl {
namespace {

/// What the first sweep finds of the entries that are not listed.
struct RestFacts {
    Side q, ce;             // at temperature tau and 1
    float s_label = 0;
    float max() const { return q.max == -kInf ? 0.0f : q.max; }  // -inf - -inf would be NaN
};

inline Float model_logits(Float x, const Transform& transform) {
    if (transform.softcap == 0.0f) return x * transform.scale;
    return select((x == kInf) | (x == -kInf), x, transform.softcap * tanh_of(x * (transform.scale / transform.softcap)));
}

template <class S, bool transformed, bool Some>
inline Two load_logits(const typename S::Storage* p, int count, const Transform& transform) {
    Two x = load_two<S, Some>(p, count, -kInf);
    if constexpr (transformed) x = {model_logits(x.a, transform), model_logits(x.b, transform)};
    return x;
}

/// Puts a block's logits, as the model means them, in their places of scratch; their maximum.
template <class S, bool transformed>
inline float load_block(const typename S::Storage* row, Pieces pieces, std::int64_t block, const Transform& transform, float* kept) {
    Float top = broadcast(-kInf);
    for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t place, auto rest) POCL_INLINE {
        const Two s = load_logits<S, transformed, rest.value>(row + v, count, transform);
        if constexpr (!rest.value) {
            fetch(row + v + kAhead);
            if constexpr (sizeof *row == 4) fetch(row + v + kAhead + kWidth);
        }
        top = max(s.a, max(s.b, top));
        F32::store(kept + place, s.a);
        F32::store(kept + place + kWidth, s.b);
    });
    return max_lane(top);
}

/// Where the piece of entry v begins.
inline std::int64_t piece_of(const Pieces& pieces, std::int64_t v) { return v < pieces.head ? 0 : v - (v - pieces.head) % kTwo; }

/// The place in scratch of entry v itself.
template <class S>
inline std::int64_t place_of(const Pieces& pieces, std::int64_t v) {
    const std::int64_t piece = piece_of(pieces, v);
    return pieces.place(piece) + S::place(static_cast<int>(v - piece));
}

inline float largest_of(const float* kept, std::int64_t begin, std::int64_t end) {
    Float top = broadcast(-kInf);
    for (std::int64_t at = begin; at < end; at += kWidth) top = max(F32::load(kept + at), top);
    return max_lane(top);
}

/// Adds the logits at [begin, end) of scratch, of which `largest` is the maximum, to the sums. 2^x takes their place, and CE's own that
/// in `kept_ce`. -inf adds nothing.
template <OwnCe ce>
inline void add_block(float* kept, float* kept_ce, std::int64_t begin, std::int64_t end, float largest, RestFacts& f) {
    f.q.raise(largest);
    f.ce.raise(largest);
    const Float lowest = broadcast(-1000.0f), top = broadcast(f.max()), factor = broadcast(f.q.factor);  // 0 times `lowest` is 0
    Float q_sum = {}, x_sum = {}, ce_sum = {};
    for (std::int64_t at = begin; at < end; at += kWidth) {
        const Float below = F32::load(kept + at) - top, x = max(lowest, below * factor), q = exp2_of(x);
        q_sum += q;
        x_sum += q * x;
        F32::store(kept + at, q);
        if constexpr (ce == OwnCe::at_tau_2) ce_sum += q * q;
        if constexpr (ce == OwnCe::yes) {
            const Float c = exp2_of(below * kLog2E);
            ce_sum += c;
            F32::store(kept_ce + at, c);
        }
    }
    f.q.z += sum_lanes(q_sum);
    f.q.x_sum += sum_lanes(x_sum);
    if constexpr (ce != OwnCe::at_tau_1) f.ce.z += sum_lanes(ce_sum);
}

/// Sorts the present entries of a row by block: those of block b are by_block[ends[b - 1]] to by_block[ends[b]].
inline void sort_by_block(const float* log_probs, const std::int64_t* indices, std::int64_t K, const Pieces& pieces, const SparseScratch& scratch) {
    const std::int64_t blocks = pieces.blocks();
    const auto block_of = [&](std::int64_t v) { return v < pieces.head ? 0 : (v - pieces.head) / kBlock; };
    std::int32_t* const ends = scratch.ends;
    for (std::int64_t b = 0; b <= blocks; ++b) ends[b] = 0;
    for (std::int64_t j = 0; j < K; ++j)
        if (log_probs[j] != -kInf) ++ends[block_of(indices[j]) + 1];
    for (std::int64_t b = 1; b <= blocks; ++b) ends[b] += ends[b - 1];
    for (std::int64_t j = 0; j < K; ++j)  // each moves its block's beginning on, at last to where the next one's was
        if (log_probs[j] != -kInf) scratch.by_block[ends[block_of(indices[j])]++] = static_cast<std::int32_t>(j);
}

/// The first sweep. Leaves the listed entries' logits in scratch.s, -inf where one is absent, and the rest's exponentials in scratch.
template <class S, bool transformed, OwnCe ce>
inline void sweep(const SparseTask& task, std::int64_t n, const Pieces& pieces, const SparseScratch& scratch, RestFacts& f) {
    const auto* const row = static_cast<const typename S::Storage*>(task.student.data) + n * task.student.row_stride;
    const std::int64_t label = task.labels[n];
    const std::int64_t* const indices = task.indices + n * task.K;
    for (std::int64_t j = 0; j < task.K; ++j) scratch.s[j] = -static_cast<double>(kInf);
    sort_by_block(task.log_probs + n * task.K, indices, task.K, pieces, scratch);
    std::int64_t at = 0;
    for (std::int64_t b = 0; b < pieces.blocks(); ++b) {
        float largest = load_block<S, transformed>(row, pieces, b, task.transform, scratch.kept), largest_listed = -kInf;
        if (label >= pieces.begin(b) && label < pieces.end(b)) f.s_label = scratch.kept[place_of<S>(pieces, label)];
        for (; at < scratch.ends[b]; ++at) {
            const std::int32_t j = scratch.by_block[at];
            float& s = scratch.kept[place_of<S>(pieces, indices[j])];
            scratch.s[j] = s;
            if (s > largest_listed) largest_listed = s;
            s = -kInf;
        }
        const std::int64_t begin = pieces.place(pieces.begin(b)), end = pieces.place(piece_of(pieces, pieces.end(b) - 1)) + kTwo;
        if (largest_listed == largest) largest = largest_of(scratch.kept, begin, end);
        add_block<ce>(scratch.kept, scratch.kept_ce, begin, end, largest, f);
        scratch.kept_max[b] = f.q.max;
    }
    if constexpr (ce == OwnCe::at_tau_1) f.ce = f.q;
}

// ---- the gradient -------------------------------------------------------------------------------------------------------

/// The gradient of the rest: q times its probability at temperature tau among the rest, and ce times that at temperature 1.
struct RestWeights {
    double q = 0, ce = 0;
    Weights transform;
};

/// The second sweep. What it writes at the listed entries is written over later.
template <class S, bool transformed, OwnCe ce>
inline void write_rest(const typename S::Storage* row, Pieces pieces, const Transform& transform, const RestFacts& f, const RestWeights& w,
                       const SparseScratch& scratch, Output<S> out) {
    for (std::int64_t b = 0; b < pieces.blocks(); ++b) {
        double of_q = w.q == 0 ? 0 : w.q * f.q.weight(scratch.kept_max[b]), of_ce = w.ce == 0 ? 0 : w.ce * f.ce.weight(scratch.kept_max[b]);
        if constexpr (ce == OwnCe::at_tau_1) of_q += of_ce;
        const Float first = broadcast(static_cast<float>(of_q)), second = broadcast(static_cast<float>(of_ce));
        const auto at = [&](std::int64_t place) POCL_INLINE {
            const Float q = F32::load(scratch.kept + place);
            if constexpr (ce == OwnCe::at_tau_2) return q * (first + q * second);
            if constexpr (ce == OwnCe::yes) return first * q + second * F32::load(scratch.kept_ce + place);
            return first * q;
        };
        for_pieces(pieces, b, [&](std::int64_t v, int count, std::int64_t place, auto rest) POCL_INLINE {
            Two g{at(place), at(place + kWidth)};
            if constexpr (transformed) {
                const Two c = load_logits<S, true, rest.value>(row + v, count, transform);
                g = {g.a * w.transform.slope(c.a), g.b * w.transform.slope(c.b)};
            }
            out.template put<rest.value>(v, count, g);
        });
    }
}

template <class S>
inline void write_zeros(Pieces pieces, Output<S> out) {
    for (std::int64_t b = 0; b < pieces.blocks(); ++b)
        for_pieces(pieces, b, [&](std::int64_t v, int count, std::int64_t, auto rest) POCL_INLINE { out.template put<rest.value>(v, count, Two{}); });
}

// ---- a row --------------------------------------------------------------------------------------------------------------

/// The first sweep and what follows from it; `own` says how CE's exponentials relate to q's.
template <class S, bool transformed, OwnCe own>
inline void sparse_row(const SparseTask& task, std::int64_t n, const SparseScratch& scratch, const Output<S>& out) {
    const std::int64_t N = task.student.rows, V = task.student.columns, K = task.K, label = task.labels[n];
    const float tau = task.temperature[n], alpha = task.alpha[n];
    const float* const log_probs = task.log_probs + n * K;
    const auto* const row = static_cast<const typename S::Storage*>(task.student.data) + n * task.student.row_stride;
    const Pieces pieces{V, out.row == nullptr ? 0 : out.head()};
    RestFacts f;
    f.q.factor = kLog2E / tau;
    f.ce.factor = kLog2E;
    sweep<S, transformed, own>(task, n, pieces, scratch, f);
    const RowSums sums = compare_outcomes(task, n, {f.max(), f.q.z, f.q.x_sum, f.ce.z}, scratch);
    const bool no_softmax = sums.log_z_ce == -kInf;
    const double ce = no_softmax || f.s_label == -kInf ? kInf : sums.log_z_ce - f.s_label;
    const float c = ::powf(tau, static_cast<float>(task.temperature_power));
    const double weighted_ce = alpha == 0.0f && ce == ce ? 0.0 : alpha * ce;
    const double stats[kStats] = {weighted_ce + (1.0 - alpha) * c * sums.D, ce, sums.D, sums.student_entropy,
                             sums.teacher_entropy, !no_softmax && f.s_label == sums.largest ? 1.0 : 0.0, sums.agree ? 1.0 : 0.0};
    for (int k = 0; k < kStats; ++k) task.stats[k * N + n] = static_cast<float>(stats[k]);
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
    double label_d = weight_d * scratch.gradient[K];
    const RestWeights w = f.q.z == 0 ? RestWeights{0, 0, transform} : RestWeights{label_d, weight_ce * sums.rest_ce, transform};
    label_d *= f.q.z == 0 ? 0 : ::exp(f.s_label / static_cast<double>(tau) - sums.log_rest);
    if (w.q == 0 && w.ce == 0) write_zeros(pieces, out);
    else write_rest<S, transformed, own>(row, pieces, t, f, w, scratch, out);
    for (std::int64_t j = 0; j < K; ++j) {
        if (log_probs[j] == -kInf) continue;
        const std::int64_t v = task.indices[n * K + j];
        const double d = weight_d * scratch.gradient[j];
        if (v == label) label_d = d;
        put_one(v, weight_ce == 0 ? d : d + weight_ce * scratch.ce[j], scratch.s[j]);
    }
    if (weight_ce != 0) put_one(label, label_d + weight_ce * ::expm1(-ce), f.s_label);  // one rounding to the gradient's dtype, not two
}

template <class S, bool transformed>
inline void sparse_row(const SparseTask& task, std::int64_t n, const SparseScratch& scratch, const Output<S>& out) {
    const float tau = task.temperature[n];
    if (tau == 1.0f) sparse_row<S, transformed, OwnCe::at_tau_1>(task, n, scratch, out);
    else if (tau == 2.0f) sparse_row<S, transformed, OwnCe::at_tau_2>(task, n, scratch, out);
    else sparse_row<S, transformed, OwnCe::yes>(task, n, scratch, out);
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
            for (int k = 0; k < kStats; ++k) task.stats[k * N + n] = 0.0f;
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
