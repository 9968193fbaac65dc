// The row kernel. Included once by each rows_*.cpp, which says how wide a vector is.
//
// A pair of rows fits the second-level cache, so memory is read once and every later sweep is served from there: normalise.h, then
// sweeps.h. Rows of one dtype without -inf are swept where they lie. Any others (two dtypes, fp16, transforms, -inf) are first
// copied to fp32 in the caller's scratch, where an entry that is out of D has a logit low enough for its probabilities to be 0.
#pragma once
#include "divergence/rows.h"
#include "divergence/sweeps.h"

namespace pocl {
namespace {

template <class Format>
inline float element(const typename Format::Storage* p) {
    return load_some<Format>(p, 1, 0.0f)[0];
}

/// One row's task, resolved.
struct Row {
    std::int64_t n, V, V_s, label;
    float row_scale, c;  // c: the factor on D
    const Task* task;
    float* scratch;
};

/// The label's entry of tau dD/ds, in double.
inline double label_gradient(Family family, double log_q, double log_p, double a, double known) {
    const double q = ::exp(log_q), p = ::exp(log_p), b = 1 - a;
    const double log_m = ::log(a * p + b * q), difference = p - q;
    const double ratio = a * p + b * q > 0 ? b * difference / (a * p + b * q) : 0;
    switch (family) {
        case Family::forward_kl: return q - p;
        case Family::reverse_kl: return q * (log_q - log_p - known);
        case Family::jsd: return q > 0 ? b * q * (log_q - log_m - known) : 0;
        case Family::skew_forward_kl: return -b * q * (ratio - known);
        case Family::skew_reverse_kl: return q > 0 ? q * (log_q - log_m + a * ratio - known) : 0;
        case Family::tvd: return q * ((difference < 0 ? 0.5 : difference > 0 ? -0.5 : 0) - known);
    }
    return 0;
}

/// Everything after normalisation: D, the seven stats, and the gradient.
template <Family family, bool Copied, class S, class T, class G>
inline void finish(const Row& row, const Rows<S, T>& rows, const RowFacts& f, float s_label, const Output<G>& out) {
    const Task& task = *row.task;
    const std::int64_t N = task.student.rows;
    const float share = task.teacher_share;
    const bool wants_gradient = out.row != nullptr;
    double D = 0, known = 0;  // known: the mean of u under q, for the gradient q (u - mean)
    if (!f.all_out) {
        if constexpr (family == Family::forward_kl || family == Family::reverse_kl) {
            D = known = kl<family, S, T>(rows.s, rows.t, row.V, f);
        } else {
            const MixtureSums sums = mixture<family, S, T>(rows.s, rows.t, row.V, f, share, rows.u);
            D = sums.D;
            known = sums.u;
        }
    }
    const bool no_softmax = f.ce.z == 0;  // nothing but -inf: CE is infinite and nothing can lower it
    const double ce = no_softmax || s_label == -kInf ? kInf : -kLn2 * f.ce.log2_of(s_label);
    const Transform& transform = task.student_transform;
    const Weights w{f.all_out ? 0.0f : row.row_scale * (1.0f - f.alpha) * row.c / f.tau, no_softmax ? 0.0f : row.row_scale * f.alpha,
                    transform.scale, transform.softcap == 0.0f ? 0.0f : 1.0f / transform.softcap};
    const float label_t = wants_gradient && row.label < row.V ? element<T>(rows.t + row.label) : 0.0f;
    const float label_s = wants_gradient && row.label < row.V ? element<S>(rows.s + row.label) : 0.0f;
    if (wants_gradient) {
        constexpr bool is_mixture = family == Family::jsd || family == Family::skew_forward_kl || family == Family::skew_reverse_kl;
        const float factor = is_mixture ? mixture_factor(family, share) : 1.0f;
        std::int64_t done = row.V;
        if constexpr (Copied) {
            if (f.all_out) done = 0;
            else gradient<family, true, true>(rows, row.V, f, w, known, factor, out);
            ce_gradient<true, F32>(rows.c, done, row.V_s, f, w, out);
        } else {
            const bool shared = w.ce == 0.0f || (f.tau == 1.0f && row.V == row.V_s);
            if (shared) gradient<family, false, false>(rows, row.V, f, w, known, factor, out);
            else gradient<family, true, false>(rows, row.V, f, w, known, factor, out);
            ce_gradient<false, S>(rows.s, done, row.V_s, f, w, out);
        }
        if (w.ce != 0.0f) {  // the label's entry again, with its -1: one rounding to the gradient's dtype, not two
            double d_term = 0;
            if (row.label < row.V && !f.all_out && label_s > 2 * f.floor && label_t > 2 * f.floor) {
                d_term = label_gradient(family, kLn2 * f.q.log2_of(label_s), kLn2 * f.p.log2_of(label_t), share, known);
            }
            Float g = {}, slope = broadcast(1.0f);
            if constexpr (Copied) slope = w.slope(broadcast(s_label));
            g[0] = static_cast<float>((w.d * d_term + w.ce * ::expm1(-ce)) * slope[0]);
            store_some<G>(out.row + row.label, g, 1);
        }
    }
    const double weighted_ce = f.alpha == 0.0f && ce == ce ? 0.0 : f.alpha * ce;
    const double loss = weighted_ce + (1.0 - f.alpha) * row.c * D;
    const bool any_in = !f.all_out;
    const double stats[7] = {loss, ce, D, any_in ? f.q.entropy() : 0, any_in ? f.p.entropy() : 0,
                             !no_softmax && s_label == f.ce.max ? 1.0 : 0.0, any_in && f.agree ? 1.0 : 0.0};
    for (int k = 0; k < 7; ++k) task.stats[k * N + row.n] = static_cast<float>(stats[k]);
}

template <Family family, OwnCe ce, class S, class T>
inline bool normalise_row(const typename S::Storage* s, const typename T::Storage* t, std::int64_t V, RowFacts& f) {
    constexpr Moment moment = family == Family::forward_kl ? Moment::of_p : family == Family::reverse_kl ? Moment::of_q : Moment::none;
    return normalise<moment, ce, S, T>(s, t, V, f);
}

inline RowFacts begin_row(const Task& task, std::int64_t n) {
    RowFacts f;
    f.tau = task.temperature[n];
    f.alpha = task.alpha[n];
    f.floor = kLowest * (f.tau < 1.0f ? f.tau : 1.0f);
    f.q.factor = f.p.factor = kLog2E / f.tau;
    f.ce.factor = kLog2E;
    return f;
}

/// A row's logits as the model means them, in fp32.
template <class Format>
inline void copy_transformed(const typename Format::Storage* from, std::int64_t count_all, const Transform& transform, float* to) {
    const float scale = transform.scale, softcap = transform.softcap;
    for_vectors(0, count_all, [&](std::int64_t v, int count, auto rest) {
        Float x = load<Format, rest.value>(from, v, count, 0.0f);
        if (softcap != 0.0f) x = select((x == kInf) | (x == -kInf), x, softcap * tanh_of(x * (scale / softcap)));
        else x = x * scale;
        if constexpr (rest.value) store_some<F32>(to + v, x, count);
        else F32::store(to + v, x);
    });
}

inline void copy_row(const Matrix& matrix, std::int64_t n, std::int64_t count, const Transform& transform, float* to) {
    const std::int64_t first = n * matrix.row_stride;
    switch (matrix.dtype) {
        case DType::float32: return copy_transformed<F32>(static_cast<const float*>(matrix.data) + first, count, transform, to);
        case DType::bfloat16: return copy_transformed<BF16>(static_cast<const std::uint16_t*>(matrix.data) + first, count, transform, to);
        case DType::float16: return copy_transformed<FP16>(static_cast<const std::uint16_t*>(matrix.data) + first, count, transform, to);
    }
}

/// The row by way of fp32 copies.
template <Family family, class G>
void copied_row(const Row& row, const Output<G>& out) {
    const Task& task = *row.task;
    RowFacts f = begin_row(task, row.n);
    float* const u = row.scratch;
    float* const c = u + row.V;
    float* const s = c + row.V_s;
    float* const t = s + row.V;
    copy_row(task.student, row.n, row.V_s, task.student_transform, c);
    copy_row(task.teacher, row.n, row.V, task.teacher_transform, t);
    const Float floor = broadcast(f.floor * 0.999f);  // above what `normalise` takes for too low
    Int in = {};
    for_vectors(0, row.V, [&](std::int64_t v, int count, auto rest) {
        const Float x = load<F32, rest.value>(c, v, count, -kInf), y = load<F32, rest.value>(t, v, count, -kInf);
        const Int out_of_d = (x == -kInf) | (y == -kInf);
        in |= ~out_of_d;
        // NaN passes through max as its second argument
        const Float x_in = select(out_of_d, broadcast(2.0f * f.floor), max(floor, x));
        const Float y_in = select(out_of_d, broadcast(2.0f * f.floor), max(floor, y));
        if constexpr (rest.value) {
            store_some<F32>(s + v, x_in, count);
            store_some<F32>(t + v, y_in, count);
        } else {
            F32::store(s + v, x_in);
            F32::store(t + v, y_in);
        }
    });
    f.all_out = !any(in);
    if (!f.all_out) {
        const float floor_before = f.floor;
        f.floor *= 2.5f;  // every logit is fit to be swept now
        normalise_row<family, OwnCe::no, F32, F32>(s, t, row.V, f);
        f.floor = floor_before;
    }
    normalise_ce<F32>(c, 0, row.V_s, f.ce);
    const Rows<F32, F32> rows{s, t, c, u};
    finish<family, true, F32, F32, G>(row, rows, f, c[row.label], out);
}

/// The row where it lies: student and teacher of one dtype, untransformed. False where it holds a logit that is too low for that.
template <Family family, class S>
bool direct_row(const Row& row, const Output<S>& out) {
    using Storage = typename S::Storage;
    const Task& task = *row.task;
    RowFacts f = begin_row(task, row.n);
    const Storage* s = static_cast<const Storage*>(task.student.data) + row.n * task.student.row_stride;
    const Storage* t = static_cast<const Storage*>(task.teacher.data) + row.n * task.teacher.row_stride;
    bool swept;
    if (f.tau == 1.0f) {
        swept = normalise_row<family, OwnCe::at_tau_1, S, S>(s, t, row.V, f);
        f.ce = f.q;
    } else if (f.tau == 2.0f) {
        swept = normalise_row<family, OwnCe::at_tau_2, S, S>(s, t, row.V, f);
    } else {
        swept = normalise_row<family, OwnCe::yes, S, S>(s, t, row.V, f);
    }
    if (!swept) return false;
    normalise_ce<S>(s, row.V, row.V_s, f.ce);
    const Rows<S, S> rows{s, t, nullptr, row.scratch};
    finish<family, false, S, S, S>(row, rows, f, element<S>(s + row.label), out);
    return true;
}

template <Family family, class S>
void rows_of(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) {
    using Storage = typename S::Storage;
    const std::int64_t N = task.student.rows, V_s = task.student.columns;
    const std::int64_t V = V_s < task.teacher.columns ? V_s : task.teacher.columns;
    const std::int64_t row_bytes = V_s * static_cast<std::int64_t>(sizeof(Storage));
    const bool direct = !__is_same(S, FP16) && task.teacher.dtype == task.student.dtype && task.student_transform.identity() &&
                        task.teacher_transform.identity();
    // Past the caches when the gradient is too large to stay in them anyway; not over the student's own logits, which they hold.
    const bool stream = task.gradient.data != task.student.data && row_bytes * N > (std::int64_t{16} << 20);
    for (std::int64_t n = begin; n < end; ++n) {
        Storage* const g_row =
            task.gradient.data == nullptr ? nullptr : static_cast<Storage*>(task.gradient.data) + n * task.gradient.row_stride;
        const std::int64_t label = task.labels[n];
        if (label == task.ignore_index) {
            for (int k = 0; k < 7; ++k) task.stats[k * N + n] = 0.0f;
            if (g_row != nullptr) std::memset(g_row, 0, static_cast<std::size_t>(row_bytes));
            continue;
        }
        const float tau = task.temperature[n];
        const Row row{n, V, V_s, label, task.row_scale[n], ::powf(tau, static_cast<float>(task.temperature_power)), &task, scratch};
        const Output<S> out{g_row, stream && g_row != nullptr};
        bool done = false;
        if constexpr (!__is_same(S, FP16)) done = direct && direct_row<family, S>(row, out);
        if (!done) copied_row<family, S>(row, out);
    }
#if defined(__AVX2__)
    if (stream) _mm_sfence();
#endif
}

template <Family family>
void rows_by_student(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) {
    switch (task.student.dtype) {
        case DType::float32: return rows_of<family, F32>(task, begin, end, scratch);
        case DType::bfloat16: return rows_of<family, BF16>(task, begin, end, scratch);
        case DType::float16: return rows_of<family, FP16>(task, begin, end, scratch);
    }
}

inline void rows(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) {
    switch (task.family) {
        case Family::forward_kl: return rows_by_student<Family::forward_kl>(task, begin, end, scratch);
        case Family::reverse_kl: return rows_by_student<Family::reverse_kl>(task, begin, end, scratch);
        case Family::jsd: return rows_by_student<Family::jsd>(task, begin, end, scratch);
        case Family::skew_forward_kl: return rows_by_student<Family::skew_forward_kl>(task, begin, end, scratch);
        case Family::skew_reverse_kl: return rows_by_student<Family::skew_reverse_kl>(task, begin, end, scratch);
        case Family::tvd: return rows_by_student<Family::tvd>(task, begin, end, scratch);
    }
}

}  // namespace
}  // namespace pocl
