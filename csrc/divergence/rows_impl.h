// The row kernel. Included once by each rows_*.cpp, which says how wide a vector is.
//
// A pair of rows fits the second-level cache, so memory is read once and every later pass is served from there:
//   1. the maxima, and whether some logit is -inf;
//   2. the normalisers of CE, q and p, and the entropies;
//   3. D, as a sum of terms none of which is negative (`divergence_term`): no small D is the difference of two large sums;
//   4. the gradient (for forward KL in the same pass as 3, since its gradient does not need D).
#pragma once
#include <math.h>

#include "divergence/divergence.h"
#include "divergence/vector.h"

namespace pocl {
namespace {

constexpr std::int64_t kBlock = 2048;  // elements summed in fp32 before they join a double

struct Whole { static constexpr bool value = false; };
struct Rest { static constexpr bool value = true; };

/// Calls body(position, count, Whole) over the whole vectors of [begin, end), then body(position, count, Rest) for what remains,
/// which `load` fills up with -inf.
template <class Body>
inline void for_vectors(std::int64_t begin, std::int64_t end, Body&& body) {
    std::int64_t v = begin;
    for (; v + kWidth <= end; v += kWidth) body(v, kWidth, Whole{});
    if (v < end) body(v, static_cast<int>(end - v), Rest{});
}

template <class Format>
inline Float load(const typename Format::Storage* row, std::int64_t v, int count) {
    return count == kWidth ? Format::load(row + v) : load_some<Format>(row + v, count, -kInf);
}

/// What pass 1 and 2 find out about a row.
struct RowFacts {
    float tau, inv_tau, alpha;
    float max_ce;                   // over the student's whole row
    float max_s, max_t;             // over the entries that D compares
    bool some_out, all_out;         // some, or all, entries have a logit of -inf on either side
    bool nothing_ce = false;        // the student's whole row is -inf
    double log_z_ce, log_z_q, log_z_p;
    double entropy_q, entropy_p;
    bool agree;
};

/// Student and teacher logits, relative to their maxima and over tau; -inf on both sides where the entry is out of D.
template <bool SomeOut>
inline void shift(const RowFacts& f, Float s, Float t, Float& x, Float& y) {
    if constexpr (SomeOut) {
        const Int out = (s == -kInf) | (t == -kInf);
        s = select(out, broadcast(-kInf), s);
        t = select(out, broadcast(-kInf), t);
    }
    x = (s - f.max_s) * f.inv_tau;
    y = (t - f.max_t) * f.inv_tau;
}

/// The maxima over the entries that D compares, where some logit of the first V is -inf.
template <class S, class T>
inline void find_maxima_without(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V, RowFacts& f) {
    Float max_s = broadcast(-kInf), max_t = max_s;
    for_vectors(0, V, [&](std::int64_t v, int count, auto) {
        const Float s = load<S>(s_row, v, count), t = load<T>(t_row, v, count);
        const Int out = (s == -kInf) | (t == -kInf);
        max_s = max(select(out, broadcast(-kInf), s), max_s);
        max_t = max(select(out, broadcast(-kInf), t), max_t);
    });
    f.max_s = max_lane(max_s);
    f.max_t = max_lane(max_t);
}

template <class S, class T>
inline void find_maxima(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V, std::int64_t V_s,
                        RowFacts& f) {
    Float max_s = broadcast(-kInf), max_t = max_s, min_s = broadcast(kInf), min_t = min_s;
    for_vectors(0, V, [&](std::int64_t v, int count, auto rest) {
        Float s, t;
        if constexpr (rest.value) {  // filled up with NaN, which max and min pass over
            s = load_some<S>(s_row + v, count, __builtin_nanf(""));
            t = load_some<T>(t_row + v, count, __builtin_nanf(""));
        } else {
            s = S::load(s_row + v);
            t = T::load(t_row + v);
        }
        max_s = max(s, max_s);
        max_t = max(t, max_t);
        min_s = min(s, min_s);
        min_t = min(t, min_t);
    });
    f.max_s = max_lane(max_s);
    f.max_t = max_lane(max_t);
    for_vectors(V, V_s, [&](std::int64_t v, int count, auto) { max_s = max(load<S>(s_row, v, count), max_s); });
    f.max_ce = max_lane(max_s);
    if (f.max_ce == -kInf) f.max_ce = 0;  // nothing but -inf (then z_ce is 0) or NaN: -inf - -inf would make a NaN of the first
    f.some_out = any((min_s == -kInf) | (min_t == -kInf));
    if (f.some_out) find_maxima_without<S, T>(s_row, t_row, V, f);
    f.all_out = f.max_s == -kInf || f.max_t == -kInf;
}

template <bool SomeOut, bool SameCE, class S, class T>
inline void find_normalisers(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V,
                             std::int64_t V_s, RowFacts& f) {
    double z_ce = 0, z_q = 0, z_p = 0, sx = 0, sy = 0;
    Int agree = {};
    for (std::int64_t block = 0; block < V; block += kBlock) {
        Float ce = {}, q_sum = {}, p_sum = {}, x_sum = {}, y_sum = {};
        for_vectors(block, block + kBlock < V ? block + kBlock : V, [&](std::int64_t v, int count, auto rest) {
            constexpr bool some_out = SomeOut || rest.value;
            const Float s = load<S>(s_row, v, count), t = load<T>(t_row, v, count);
            Float x, y;
            shift<some_out>(f, s, t, x, y);
            const Float q = exp_negative(x), p = exp_negative(y);
            q_sum += q;
            p_sum += p;
            agree |= (x == 0.0f) & (y == 0.0f);
            if constexpr (some_out) {  // 0 · inf
                x_sum += select(x == -kInf, Float{}, q * x);
                y_sum += select(y == -kInf, Float{}, p * y);
            } else {
                x_sum += q * x;
                y_sum += p * y;
            }
            if constexpr (!SameCE) ce += exp_negative(s - f.max_ce);
        });
        z_q += sum_lanes(q_sum);
        z_p += sum_lanes(p_sum);
        sx += sum_lanes(x_sum);
        sy += sum_lanes(y_sum);
        if constexpr (!SameCE) z_ce += sum_lanes(ce);
    }
    if constexpr (!SameCE) {
        for (std::int64_t block = V; block < V_s; block += kBlock) {
            Float ce = {};
            for_vectors(block, block + kBlock < V_s ? block + kBlock : V_s,
                        [&](std::int64_t v, int count, auto) { ce += exp_negative(load<S>(s_row, v, count) - f.max_ce); });
            z_ce += sum_lanes(ce);
        }
    }
    f.log_z_q = ::log(z_q);
    f.log_z_p = ::log(z_p);
    f.nothing_ce = !SameCE && z_ce == 0;
    f.log_z_ce = SameCE ? f.log_z_q : f.nothing_ce ? 0 : ::log(z_ce);
    f.entropy_q = f.log_z_q - sx / z_q;
    f.entropy_p = f.log_z_p - sy / z_p;
    f.agree = any(agree);
}

/// a log(a/b) - a + b >= 0, gap being log(a/b): the terms of KL(a‖b), their sum being the same because a and b both sum to 1.
/// Near 0 it is a times (e^-gap - 1 + gap) by its series: its error is then relative to D itself, down to D = 0 between equals, and
/// an error in the normalisers counts only squared.
inline Float divergence_term(Float a, Float b, Float gap) {
    Float h = gap * 1.3888889e-3f - 8.3333333e-3f;
    h = h * gap + 4.1666667e-2f;
    h = h * gap - 1.6666667e-1f;
    h = h * gap + 0.5f;
    const Float square = gap * gap;
    return select(square < 0.0625f, a * (square * h), a * gap - (a - b));
}

/// D's terms and, where wanted, the gradient. `Divergence` false leaves D out (it is known), `Gradient` false the gradient.
template <Family family, bool SomeOut, bool Divergence, bool Gradient, bool Stream, class S, class T>
inline double sweep(const typename S::Storage* s_row, const typename T::Storage* t_row, typename S::Storage* g_row,
                    std::int64_t V, std::int64_t V_s, const RowFacts& f, double D, float weight_d, float weight_ce) {
    const Float gap_shift = broadcast(static_cast<float>(f.log_z_p - f.log_z_q));
    const Float inv_z_q = broadcast(static_cast<float>(::exp(-f.log_z_q)));
    const Float inv_z_p = broadcast(static_cast<float>(::exp(-f.log_z_p)));
    const Float inv_z_ce = broadcast(weight_ce * static_cast<float>(::exp(-f.log_z_ce)));
    const Float known = broadcast(static_cast<float>(D));
    const Float max_gap = broadcast(f.max_t - f.max_s);
    double total = 0;
    const auto put = [&](std::int64_t v, int count, Float g) {
        if (count != kWidth) store_some<S>(g_row + v, g, count);
        else if constexpr (Stream) S::stream(g_row + v, g);
        else S::store(g_row + v, g);
    };
    for (std::int64_t block = 0; block < V; block += kBlock) {
        Float terms = {};
        for_vectors(block, block + kBlock < V ? block + kBlock : V, [&](std::int64_t v, int count, auto rest) {
            constexpr bool some_out = SomeOut || rest.value;
            const Float s = load<S>(s_row, v, count), t = load<T>(t_row, v, count);
            Float x, y;
            shift<some_out>(f, s, t, x, y);
            const Float q = exp_negative(x) * inv_z_q, p = exp_negative(y) * inv_z_p;
            Float gap = ((t - s) - max_gap) * f.inv_tau - gap_shift;  // log p - log q; y - x would lose digits of near logits
            if constexpr (some_out) gap = select(x == -kInf, Float{}, gap);
            if constexpr (Divergence) terms += family == Family::forward_kl ? divergence_term(p, q, gap) : divergence_term(q, p, -gap);
            if constexpr (Gradient) {
                Float g = weight_d * (family == Family::forward_kl ? q - p : q * (-gap - known));
                if (weight_ce != 0.0f) g += inv_z_ce * exp_negative(s - f.max_ce);
                put(v, count, g);
            }
        });
        total += sum_lanes(terms);
    }
    if constexpr (Gradient) {
        for_vectors(V, V_s, [&](std::int64_t v, int count, auto) {
            Float g = {};
            if (weight_ce != 0.0f) g = inv_z_ce * exp_negative(load<S>(s_row, v, count) - f.max_ce);
            put(v, count, g);
        });
    }
    return total;
}

template <Family family, bool SomeOut, bool Gradient, bool Stream, class S, class T>
inline double divergence_and_gradient(const typename S::Storage* s_row, const typename T::Storage* t_row,
                                      typename S::Storage* g_row, std::int64_t V, std::int64_t V_s, const RowFacts& f,
                                      float weight_d, float weight_ce) {
    if constexpr (family == Family::forward_kl || !Gradient) {
        return sweep<family, SomeOut, true, Gradient, Stream, S, T>(s_row, t_row, g_row, V, V_s, f, 0, weight_d, weight_ce);
    } else {
        const double D = sweep<family, SomeOut, true, false, false, S, T>(s_row, t_row, g_row, V, V_s, f, 0, 0, 0);
        sweep<family, SomeOut, false, true, Stream, S, T>(s_row, t_row, g_row, V, V_s, f, D, weight_d, weight_ce);
        return D;
    }
}

template <class Format>
inline float element(const typename Format::Storage* p) {
    return load_some<Format>(p, 1, 0.0f)[0];
}

template <Family family, bool Gradient, bool Stream, class S, class T>
void one_row(const Task& task, std::int64_t n) {
    const std::int64_t N = task.student.rows, V_s = task.student.columns;
    const std::int64_t V = V_s < task.teacher.columns ? V_s : task.teacher.columns;
    auto* g_row = Gradient ? static_cast<typename S::Storage*>(task.gradient.data) + n * task.gradient.row_stride : nullptr;
    const std::int64_t label = task.labels[n];
    if (label == task.ignore_index) {
        for (int k = 0; k < 7; ++k) task.stats[k * N + n] = 0.0f;
        if (Gradient) std::memset(g_row, 0, sizeof(typename S::Storage) * static_cast<unsigned long>(V_s));
        return;
    }
    const auto* s_row = static_cast<const typename S::Storage*>(task.student.data) + n * task.student.row_stride;
    const auto* t_row = static_cast<const typename T::Storage*>(task.teacher.data) + n * task.teacher.row_stride;
    RowFacts f;
    f.tau = task.temperature[n];
    f.inv_tau = 1.0f / f.tau;
    f.alpha = task.alpha[n];
    find_maxima<S, T>(s_row, t_row, V, V_s, f);
    const float row_scale = task.row_scale[n], c = ::powf(f.tau, static_cast<float>(task.temperature_power));
    const float weight_d = row_scale * (1.0f - f.alpha) * c * f.inv_tau;
    float weight_ce = row_scale * f.alpha;
    double D;
    if (f.some_out) {
        find_normalisers<true, false, S, T>(s_row, t_row, V, V_s, f);
        if (f.nothing_ce) weight_ce = 0;  // the label's CE is infinite and nothing can lower it
        if (f.all_out) {  // nothing to compare: only CE is left, and sums over nothing must not become NaN
            f.log_z_q = f.log_z_p = f.entropy_q = f.entropy_p = 0;
            f.max_s = f.max_t = 0;
            f.agree = false;
        }
        D = divergence_and_gradient<family, true, Gradient, Stream, S, T>(s_row, t_row, g_row, V, V_s, f, weight_d, weight_ce);
    } else if (f.tau == 1.0f && V == V_s) {
        find_normalisers<false, true, S, T>(s_row, t_row, V, V_s, f);
        D = divergence_and_gradient<family, false, Gradient, Stream, S, T>(s_row, t_row, g_row, V, V_s, f, weight_d, weight_ce);
    } else {
        find_normalisers<false, false, S, T>(s_row, t_row, V, V_s, f);
        D = divergence_and_gradient<family, false, Gradient, Stream, S, T>(s_row, t_row, g_row, V, V_s, f, weight_d, weight_ce);
    }
    const float s_label = element<S>(s_row + label);
    const double ce = f.log_z_ce + f.max_ce - s_label;
    if (Gradient && weight_ce != 0.0f) {  // the label's entry again, with its -1: one rounding to the gradient's dtype, not two
        double d_term = 0;
        const float t_label = label < V ? element<T>(t_row + label) : -kInf;
        if (s_label != -kInf && t_label != -kInf && label < V) {
            const double log_q = static_cast<double>(s_label - f.max_s) * f.inv_tau - f.log_z_q;
            const double log_p = static_cast<double>(t_label - f.max_t) * f.inv_tau - f.log_z_p;
            d_term = family == Family::forward_kl ? ::exp(log_q) - ::exp(log_p) : ::exp(log_q) * (log_q - log_p - D);
        }
        Float g = {};
        g[0] = static_cast<float>(weight_d * d_term + weight_ce * (::exp(s_label - f.max_ce - f.log_z_ce) - 1.0));
        store_some<S>(g_row + label, g, 1);
    }
    const double weighted_ce = f.alpha == 0.0f && ce == ce ? 0.0 : f.alpha * ce;
    const double loss = weighted_ce + (1.0 - f.alpha) * c * D;
    const double stats[7] = {loss, ce, D, f.entropy_q, f.entropy_p, s_label == f.max_ce ? 1.0 : 0.0, f.agree ? 1.0 : 0.0};
    for (int k = 0; k < 7; ++k) task.stats[k * N + n] = static_cast<float>(stats[k]);
}

template <Family family, class S, class T>
void rows_of(const Task& task, std::int64_t begin, std::int64_t end) {
    using Row = void (*)(const Task&, std::int64_t);
    const std::int64_t bytes = task.gradient.row_stride * static_cast<std::int64_t>(sizeof(typename S::Storage));
    const std::int64_t alignment = static_cast<std::int64_t>(sizeof(typename S::Storage)) * kWidth;
    // past the caches when the gradient is too large to stay in them anyway; streaming stores must be aligned
    const bool stream = task.gradient.data != nullptr && bytes * task.gradient.rows > (std::int64_t{16} << 20) &&
                        bytes % alignment == 0 && reinterpret_cast<std::uintptr_t>(task.gradient.data) % alignment == 0;
    const Row row = task.gradient.data == nullptr ? &one_row<family, false, false, S, T>
                    : stream                      ? &one_row<family, true, true, S, T>
                                                  : &one_row<family, true, false, S, T>;
    for (std::int64_t n = begin; n < end; ++n) row(task, n);
#if defined(__AVX2__)
    if (stream) _mm_sfence();
#endif
}

template <Family family, class S>
void rows_by_teacher(const Task& task, std::int64_t begin, std::int64_t end) {
    switch (task.teacher.dtype) {
        case DType::float32: return rows_of<family, S, F32>(task, begin, end);
        case DType::bfloat16: return rows_of<family, S, BF16>(task, begin, end);
        case DType::float16: return rows_of<family, S, FP16>(task, begin, end);
    }
}

template <Family family>
void rows_by_student(const Task& task, std::int64_t begin, std::int64_t end) {
    switch (task.student.dtype) {
        case DType::float32: return rows_by_teacher<family, F32>(task, begin, end);
        case DType::bfloat16: return rows_by_teacher<family, BF16>(task, begin, end);
        case DType::float16: return rows_by_teacher<family, FP16>(task, begin, end);
    }
}

inline void rows(const Task& task, std::int64_t begin, std::int64_t end) {
    switch (task.family) {
        case Family::forward_kl: return rows_by_student<Family::forward_kl>(task, begin, end);
        case Family::reverse_kl: return rows_by_student<Family::reverse_kl>(task, begin, end);
    }
}

}  // namespace
}  // namespace pocl
