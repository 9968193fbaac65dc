// The later sweeps over a pair of rows, which the second-level cache still holds: D where moments do not give it, and the gradient.
#pragma once
#include "divergence/normalise.h"

namespace pocl {
namespace {

/// Where the gradient of a row goes, in the student's dtype; past the caches where it is too large to stay in them anyway.
template <class G>
struct Output {
    typename G::Storage* row;
    bool stream;

    void put(std::int64_t v, Float g) const {
        if (stream) G::stream(row + v, g);
        else G::store(row + v, g);
    }
    /// Elements before the first at which a streaming store, which must be aligned, is possible.
    std::int64_t head() const {
        constexpr std::uintptr_t bytes = sizeof(typename G::Storage) * kWidth;
        return static_cast<std::int64_t>((bytes - reinterpret_cast<std::uintptr_t>(row) % bytes) % bytes / sizeof(typename G::Storage));
    }
};

/// Weights of a row's gradient, and how a transform of the student's logits passes it on.
struct Weights {
    float d = 0, ce = 0;             // onto tau * dD/ds, and onto dCE/ds
    float scale = 1, inv_softcap = 0;

    /// d transformed / d logit, from the transformed logits.
    Float slope(Float c) const {
        const Float ratio = max(broadcast(-1.0f), max(broadcast(kLowest), c) * inv_softcap);  // -inf too: not -inf * 0
        return scale * (1.0f - ratio * ratio);
    }
};

/// The student's logits of CE, their weight and exponents; q's may serve for both.
struct CrossEntropy {
    Exponents exponents;
    Float weight;  // over the normaliser
    CrossEntropy(const RowFacts& f, const Weights& w)
        : exponents(f.ce), weight(broadcast(w.ce == 0.0f ? 0.0f : static_cast<float>(w.ce / f.ce.z))) {}
    Float gradient(Float c) const { return weight * exp2_of(exponents(c)); }
};

/// Calls body(v, count, Whole or Rest) over [begin, end), the first piece short where streaming stores need it.
template <class G, class Body>
inline void for_output(const Output<G>& out, std::int64_t begin, std::int64_t end, Body&& body) {
    if (out.stream && begin == 0) {
        const std::int64_t head = out.head() < end ? out.head() : end;
        if (head > 0) body(std::int64_t{0}, static_cast<int>(head), Rest{});
        begin = head;
    }
    for_vectors(begin, end, body);
}

template <class G, bool Some>
inline void put(const Output<G>& out, std::int64_t v, int count, Float g) {
    if constexpr (Some) store_some<G>(out.row + v, g, count);
    else out.put(v, g);
}

/// CE's gradient alone over [begin, end), from rows `c` of transformed logits; also zeros where CE has no weight.
template <bool Transformed, class C, class G>
inline void ce_gradient(const typename C::Storage* c_row, std::int64_t begin, std::int64_t end, const RowFacts& f, const Weights& w,
                        const Output<G>& out) {
    const CrossEntropy ce(f, w);
    const auto body = [&](std::int64_t v, int count, auto rest) {
        const Float c = load<C, rest.value>(c_row, v, count, -kInf);
        Float g = w.ce == 0.0f ? Float{} : ce.gradient(c);
        if constexpr (Transformed) g = g * w.slope(c);
        put<G, rest.value>(out, v, count, g);
    };
    if (begin == 0) for_output(out, begin, end, body);
    else for (std::int64_t v = begin; v < end; v += kWidth)  // where a row of unequal vocabularies ends: seldom long
        body(v, static_cast<int>(end - v < kWidth ? end - v : kWidth), Rest{});
}

/// a log(a/b) - a + b >= 0, with gap = log(a/b) and difference = a - b: the terms of KL(a‖b), their sum being the same because a and
/// b both sum to 1. Near 0 it is a times (e^-gap - 1 + gap) by its series: its error is then relative to D itself, down to D = 0
/// between equals, and an error in the normalisers counts only squared.
inline Float divergence_term(Float a, Float difference, Float gap) {
    Float h = gap * 1.3888889e-3f - 8.3333333e-3f;
    h = h * gap + 4.1666667e-2f;
    h = h * gap - 1.6666667e-1f;
    h = h * gap + 0.5f;
    const Float square = gap * gap;
    return select(square < 0.0625f, a * (square * h), a * gap - difference);
}

/// q, p and their logarithms' difference at some entries.
struct Probabilities {
    Exponents exponents_q, exponents_p;
    Float factor, max_gap, gap_shift, inv_z_q, inv_z_p;
    explicit Probabilities(const RowFacts& f)
        : exponents_q(f.q), exponents_p(f.p), factor(broadcast(f.q.factor)), max_gap(broadcast(f.max_gap())),
          gap_shift(broadcast(static_cast<float>(f.gap_shift()))), inv_z_q(broadcast(static_cast<float>(1 / f.q.z))), inv_z_p(broadcast(static_cast<float>(1 / f.p.z))) {}
    Float q(Float s) const { return exp2_of(exponents_q(s)) * inv_z_q; }
    Float p(Float t) const { return exp2_of(exponents_p(t)) * inv_z_p; }
    /// log2(p/q) from the logits themselves: the difference of two exponents would lose the digits of near logits.
    Float gap(Float s, Float t) const { return ((t - s) - max_gap) * factor + gap_shift; }
};

// ---- forward and reverse KL ---------------------------------------------------------------------------------------------

/// D as a sum of terms none of which is negative, for a D too small to be the difference of two moments.
template <Family family, class S, class T>
inline double small_kl(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V, const RowFacts& f) {
    const Probabilities at(f);
    double total = 0;
    for (std::int64_t block = 0; block < V; block += kBlock) {
        Float terms = {};
        for_vectors(block, block + kBlock < V ? block + kBlock : V, [&](std::int64_t v, int count, auto rest) {
            const Float s = load<S, rest.value>(s_row, v, count, f.floor), t = load<T, rest.value>(t_row, v, count, f.floor);
            const Float q = at.q(s), p = at.p(t), gap = at.gap(s, t) * kLn2f;
            terms += family == Family::forward_kl ? divergence_term(p, p - q, gap) : divergence_term(q, q - p, -gap);
        });
        total += sum_lanes(terms);
    }
    return total;
}

/// D of the KL family, from the moments of the first sweep where they are accurate enough.
template <Family family, class S, class T>
inline double kl(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V, const RowFacts& f) {
    const double mean = family == Family::forward_kl ? f.p_moment / f.p.z : f.q_moment / f.q.z;
    const double gap = kLn2 * (mean * f.q.factor + f.gap_shift());
    const double D = family == Family::forward_kl ? gap : -gap;
    return D >= 0.01 ? D : small_kl<family, S, T>(s_row, t_row, V, f);
}

// ---- mixtures and total variation ---------------------------------------------------------------------------------------

/// What the mixture m = a p + b q needs of an entry, with all its digits where p and q are near, and finite where both underflow.
struct Mixed {
    Float q, p, difference;   // p - q
    Float log_q_m, log_p_m;   // log(q/m), log(p/m)
    Float ratio;              // b (p - q) / m = p/m - 1
};

template <Family family>
inline Mixed mixed(const Probabilities& at, Float s, Float t, Float a, Float b) {
    const Float gap = at.gap(s, t);
    const Int p_is_larger = gap > 0.0f;
    const Float larger = exp2_of(select(p_is_larger, at.exponents_p(t), at.exponents_q(s))) * select(p_is_larger, at.inv_z_p, at.inv_z_q);
    Float power;
    const Float e = exp2_minus_1(select(p_is_larger, -gap, gap), power);  // the smaller over the larger, less 1
    const Float smaller = larger * power;
    Mixed out{};
    out.q = select(p_is_larger, smaller, larger);
    out.p = select(p_is_larger, larger, smaller);
    out.difference = select(p_is_larger, -larger, larger) * e;
    if constexpr (family == Family::tvd) return out;
    const Float z = select(p_is_larger, b, a) * e;  // m over the larger, less 1
    if constexpr (family == Family::skew_forward_kl || family == Family::skew_reverse_kl)
        out.ratio = select(p_is_larger, -b, b) * e / (z + 1.0f);
    const Float log_m = log1p_of(z), gap_nats = gap * kLn2f;  // log(m / the larger)
    out.log_q_m = select(p_is_larger, -gap_nats, Float{}) - log_m;
    out.log_p_m = select(p_is_larger, Float{}, gap_nats) - log_m;
    return out;
}

/// 1 where q is larger, -1 where p is, 0 at a tie.
inline Float sign_of_q_over_p(Float gap) { return select(gap < 0.0f, broadcast(1.0f), select(gap > 0.0f, broadcast(-1.0f), Float{})); }

struct MixtureSums {
    double D = 0;
    double u = 0;  // sum of q u, with u as `mixture` leaves it in its scratch; for tvd as `gradient` computes it
};

/// D, and for the gradient u of each entry (but its factor) and its mean under q. tau dD/ds = factor q (u - mean).
template <Family family, class S, class T>
inline MixtureSums mixture(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V, const RowFacts& f,
                           float teacher_share, float* u_row) {
    const Probabilities at(f);
    const Float a = broadcast(teacher_share), b = broadcast(1.0f - teacher_share);
    MixtureSums sums;
    for (std::int64_t block = 0; block < V; block += kBlock) {
        Float terms = {}, u_sum = {};
        for_vectors(block, block + kBlock < V ? block + kBlock : V, [&](std::int64_t v, int count, auto rest) {
            const Float s = load<S, rest.value>(s_row, v, count, f.floor), t = load<T, rest.value>(t_row, v, count, f.floor);
            const Mixed m = mixed<family>(at, s, t, a, b);
            Float u;
            if constexpr (family == Family::jsd) {
                u = m.log_q_m;
                terms += a * divergence_term(m.p, b * m.difference, m.log_p_m) + b * divergence_term(m.q, -a * m.difference, u);
            } else if constexpr (family == Family::skew_forward_kl) {
                u = m.ratio;
                terms += divergence_term(m.p, b * m.difference, m.log_p_m);
            } else if constexpr (family == Family::skew_reverse_kl) {
                u = m.log_q_m + a * m.ratio;
                terms += divergence_term(m.q, -a * m.difference, m.log_q_m);
            } else {
                u = 0.5f * sign_of_q_over_p(at.gap(s, t));
                terms += 0.5f * select(m.difference < 0.0f, -m.difference, m.difference);
            }
            u_sum += m.q * u;
            if constexpr (family != Family::tvd) {
                if constexpr (rest.value) store_some<F32>(u_row + v, u, count);
                else F32::store(u_row + v, u);
            }
        });
        sums.D += sum_lanes(terms);
        sums.u += sum_lanes(u_sum);
    }
    return sums;
}

/// The factor of `mixture`'s u.
inline float mixture_factor(Family family, float teacher_share) {
    const float b = 1.0f - teacher_share;
    return family == Family::jsd ? b : family == Family::skew_forward_kl ? -b : 1.0f;
}

// ---- the gradient -------------------------------------------------------------------------------------------------------

/// A row's logits and scratch.
template <class S, class T>
struct Rows {
    const typename S::Storage* s;
    const typename T::Storage* t;
    const float* c;  // CE's logits where they are not s: transformed, and -inf where only the student's are
    float* u;        // scratch of the mixtures
};

/// The gradient over the shared vocabulary. `OwnCe`: CE's exponentials are not q's; `Copied`: the rows are copies, c is theirs.
template <Family family, bool OwnCe, bool Copied, class S, class T, class G>
inline void gradient(const Rows<S, T>& rows, std::int64_t V, const RowFacts& f, const Weights& w, double known, float factor,
                     const Output<G>& out) {
    const Probabilities at(f);
    const CrossEntropy ce(f, w);
    const Float weight_d = broadcast(w.d * factor), mean = broadcast(static_cast<float>(known));
    const Float weight_q = broadcast(OwnCe ? w.d : w.d + w.ce) * at.inv_z_q, weight_p = broadcast(w.d) * at.inv_z_p;
    for_output(out, 0, V, [&](std::int64_t v, int count, auto rest) {
        const Float s = load<S, rest.value>(rows.s, v, count, f.floor);
        const Float q = exp2_of(at.exponents_q(s));
        Float g;
        if constexpr (family == Family::forward_kl) {
            g = weight_q * q - weight_p * exp2_of(at.exponents_p(load<T, rest.value>(rows.t, v, count, f.floor)));
        } else {
            Float u;
            if constexpr (family == Family::reverse_kl) u = at.gap(s, load<T, rest.value>(rows.t, v, count, f.floor)) * -kLn2f;
            else if constexpr (family == Family::tvd) u = 0.5f * sign_of_q_over_p(at.gap(s, load<T, rest.value>(rows.t, v, count, f.floor)));
            else u = load<F32, rest.value>(rows.u, v, count, 0.0f);
            g = q * at.inv_z_q * weight_d * (u - mean);
            if constexpr (!OwnCe) g += ce.weight * q;
        }
        if constexpr (Copied) {
            const Float c = load<F32, rest.value>(rows.c, v, count, -kInf);
            g = (g + ce.gradient(c)) * w.slope(c);
        } else if constexpr (OwnCe) {
            g += ce.gradient(s);
        }
        put<G, rest.value>(out, v, count, g);
    });
}

}  // namespace
}  // namespace pocl
