// D of distributions that are near each other, and the gradient of their mixtures: from the logits' differences, where those of
// probabilities or of moments would have lost their digits. A sweep more, with its own exponentials.
#pragma once
#include "divergence/normalise.h"

namespace pocl {
namespace {

/// A row's logits.
template <class S, class T>
struct Rows {
    const typename S::Storage* s;
    const typename T::Storage* t;
};

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

/// p and its logarithm's difference to that of q at some entries, and what else their logits give.
struct Probabilities {
    Exponents exponents_q, exponents_p;
    Float factor, max_gap, gap_shift, inv_z_q, inv_z_p;
    explicit Probabilities(const RowFacts& f)
        : exponents_q(f.q), exponents_p(f.p), factor(broadcast(f.q.factor)), max_gap(broadcast(f.max_gap())),
          gap_shift(broadcast(static_cast<float>(f.gap_shift()))), inv_z_q(broadcast(static_cast<float>(1 / f.q.z))), inv_z_p(broadcast(static_cast<float>(1 / f.p.z))) {}
    Float p(Float t) const { return exp2_of(exponents_p(t)) * inv_z_p; }
    /// log2(p/q) from the logits themselves: the difference of two exponents would lose the digits of near logits.
    Float gap(Float s, Float t) const {
        const Float apart = max(broadcast(-1e30f), min(broadcast(1e30f), t - s));  // an infinite one would be NaN times a p of 0
        return (apart - max_gap) * factor + gap_shift;
    }
};

// ---- forward and reverse KL ---------------------------------------------------------------------------------------------

struct KlSums {
    double D = 0;
    bool small = false;    // whether `small_kl` found it
    double excess = 0;     // of p - q, whose sum would be 0 without the normalisers' error
};

/// D as a sum of terms none of which is negative, for a D too small to be the difference of two moments. For the gradient of forward KL
/// p - q of each entry, with the digits that a difference of the two would have lost, in `kept.second`, and their sum.
template <Family family, class S, class T>
inline KlSums small_kl(const Rows<S, T>& rows, const Pieces& pieces, const RowFacts& f, const Kept& kept) {
    const Probabilities at(f);
    KlSums sums{.small = true};
    Float to_q = {}, to_p = {};
    Maxima maxima;
    for (std::int64_t block = 0; block < pieces.blocks(); ++block) {
        if (maxima.move_to(kept, block)) {
            to_q = broadcast(static_cast<float>(f.q.weight(maxima.s)));
            to_p = broadcast(static_cast<float>(f.p.weight(maxima.t)));
        }
        Float terms = {}, excess = {};
        const auto add = [&](Float s, Float t, std::int64_t place) POCL_INLINE {
            const Float q = F32::load(kept.first + place) * to_q, gap = at.gap(s, t);
            if constexpr (family == Family::forward_kl) {
                const Float p = F32::load(kept.second + place) * to_p, half = gap * 0.5f, e = exp2_slope(half) * half;
                const Float difference = select((gap <= 1.0f) & (gap >= -1.0f), q * (e * (e + 2.0f)), p - q);  // q (2^gap - 1)
                terms += divergence_term(p, difference, gap * kLn2f);
                excess += difference;
                F32::store(kept.second + place, difference);
            } else {
                terms += divergence_term(q, q - at.p(t), gap * -kLn2f);
            }
        };
        for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t place, auto rest) POCL_INLINE {
            const Two s = load_two<S, rest.value>(rows.s + v, count, f.floor), t = load_two<T, rest.value>(rows.t + v, count, f.floor);
            add(s.a, t.a, place);
            add(s.b, t.b, place + kWidth);
        });
        sums.D += sum_lanes(terms);
        sums.excess += sum_lanes(excess);
    }
    return sums;
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

constexpr std::int32_t kSignBit = -0x7FFFFFFF - 1;
inline Float magnitude(Float x) { return (Float)((Int)x & ~kSignBit); }
/// x >= 0, or -x.
inline Float with_sign_of(Float sign, Float x) { return (Float)((Int)x | ((Int)sign & kSignBit)); }

struct MixtureSums {
    double D = 0;
    double u = 0;            // sum of q u, u without its factor, in nats
    float unit = 1.0f;       // nats in the unit of the u in scratch
};

/// D, and for the gradient 2^x_q u of each entry, in nats, in `kept.second`, and the sum of q u. tau dD/ds = factor (q u - q mean u).
template <Family family, class S, class T>
inline MixtureSums near_mixture(const Rows<S, T>& rows, const Pieces& pieces, const RowFacts& f, double teacher_share, const Kept& kept) {
    const Probabilities at(f);
    const Float a = broadcast(static_cast<float>(teacher_share)), b = broadcast(static_cast<float>(1 - teacher_share));
    MixtureSums sums;
    for (std::int64_t block = 0; block < pieces.blocks(); ++block) {
        Float terms = {}, u_sum = {};
        const auto add = [&](Float s, Float t, std::int64_t place) POCL_INLINE {
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
                u = select(m.difference == 0.0f, Float{}, with_sign_of(m.difference, broadcast(1.0f)));
                terms += 0.5f * magnitude(m.difference);
            }
            u_sum += m.q * u;
            F32::store(kept.second + place, F32::load(kept.first + place) * u);
        };
        for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t place, auto rest) POCL_INLINE {
            const Two s = load_two<S, rest.value>(rows.s + v, count, f.floor), t = load_two<T, rest.value>(rows.t + v, count, f.floor);
            add(s.a, t.a, place);
            add(s.b, t.b, place + kWidth);
        });
        sums.D += sum_lanes(terms);
        sums.u += sum_lanes(u_sum);
    }
    return sums;
}

}  // namespace
}  // namespace pocl
