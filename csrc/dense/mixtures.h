// D of a mixture m = a p + b q, and total variation: a second sweep over the exponentials that the first has kept, or of near rows over
// the logits themselves. And of every divergence the label's entry of the gradient, in double.
#pragma once
#include "dense/family.h"
#include "dense/near.h"

namespace pocl {
namespace {

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
                static_assert(family == Family::tvd);
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

/// The D from which on probabilities' differences and quotients are accurate enough: D then has an error of some 5e-8, its gradient one of
/// 5e-6 in norm at most. A D grows with the square of the logits' distance, and with that of the mixture's to the compared side; total
/// variation with the distance.
template <Family family>
inline double near_below(double teacher_share) {
    const double a = teacher_share, b = 1 - a;
    if (family == Family::jsd) return 0.01 * a * b;
    if (family == Family::skew_forward_kl) return 0.01 * b * b;
    if (family == Family::skew_reverse_kl) return 0.01 * a * a;
    return 0.02;
}

/// D of a mixture or total variation. Leaves 2^x_q u of each entry in `kept.second`.
template <Family family, class S, class T>
inline MixtureSums mixture(const Rows<S, T>& rows, const Pieces& pieces, const RowFacts& f, double teacher_share, const Kept& kept) {
    constexpr float tiny = 1.17549435e-38f;  // so that no quotient is 0/0
    // JSD's least q/m, 2^-90: log2(p/m) is taken from log2(q/m), and is `most` below it. That of a q which underflows would be too large to
    // leave so much of log2(p/q).
    constexpr float least = 8.07793567e-28f;
    const double a = teacher_share, b = 1 - a;
    const Float to_a = broadcast(static_cast<float>(a)), to_b = broadcast(static_cast<float>(b)), to_b_nats = to_b * kLog2E;
    const Float most = broadcast(static_cast<float>(-::log2(a)));  // of log2(p/m)
    // log2(p/q) = (t - s) * factor + constant
    const double shift = f.gap_shift() - static_cast<double>(f.max_gap()) * f.q.factor;
    const Float factor = broadcast(f.q.factor), constant = broadcast(static_cast<float>(shift));
    double q_weight = 0, p_weight = 0;
    Float to_q = {}, to_p = {}, a_p = {}, b_q = {};
    Maxima maxima;
    // linear: the sum of p - m or q - m, which is 0 but for rounding. Without it, D would keep the rounding of p, q and m. u: that of q u
    double D = 0, linear = 0, u = 0;
    for (std::int64_t block = 0; block < pieces.blocks(); ++block) {
        if (maxima.move_to(kept, block)) {
            q_weight = f.q.weight(maxima.s);
            p_weight = f.p.weight(maxima.t);
            to_q = broadcast(static_cast<float>(q_weight));
            to_p = broadcast(static_cast<float>(p_weight));
            a_p = broadcast(static_cast<float>(a * p_weight));
            b_q = broadcast(static_cast<float>(b * q_weight));
        }
        Float sum = {}, linear_sum = {}, u_sum = {};
        const auto add = [&](Float s, Float t, std::int64_t place) POCL_INLINE {
            const Float kept_q = F32::load(kept.first + place), kept_p = F32::load(kept.second + place);
            Float product;
            if constexpr (family == Family::tvd) {
                const Float q = kept_q * to_q, p = kept_p * to_p, difference = p - q;
                sum += magnitude(difference);
                product = select(q == p, Float{}, with_sign_of(difference, kept_q));
            } else {
                // the one that is compared, with its own share of m: so that its weight's rounding is none of the quotient's
                constexpr bool of_p = family == Family::skew_forward_kl;
                const Float compared = of_p ? kept_p * to_p : kept_q * to_q;
                const Float other = of_p ? fma(kept_q, b_q, broadcast(tiny)) : fma(kept_p, a_p, broadcast(tiny));
                const Float m = fma(compared, of_p ? to_a : to_b, other), ratio = compared / m;
                const Float log_ratio = log2_of(family == Family::jsd ? max(broadcast(least), ratio) : ratio);
                if constexpr (family == Family::jsd) {
                    sum += kept_p * min(most, fma(t - s, factor, constant) + log_ratio);
                    product = kept_q * log_ratio;
                } else {
                    static_assert(of_p || family == Family::skew_reverse_kl);
                    const Float rest = ratio - 1.0f;
                    sum += (of_p ? kept_p : kept_q) * log_ratio;
                    linear_sum += m * rest;
                    product = kept_q * (of_p ? rest : log_ratio - to_b_nats * rest);  // b (1 - q/m) = a (p/m - 1)
                }
            }
            u_sum += product;
            F32::store(kept.second + place, product);
        };
        for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t place, auto rest) POCL_INLINE {
            Two s{}, t{};
            if constexpr (family == Family::jsd) {
                s = load_two<S, rest.value>(rows.s + v, count, f.floor);
                t = load_two<T, rest.value>(rows.t + v, count, f.floor);
            }
            add(s.a, t.a, place);
            add(s.b, t.b, place + kWidth);
        });
        const double block_u = q_weight * sum_lanes(u_sum);
        u += block_u;
        linear += sum_lanes(linear_sum);
        if (family == Family::jsd) D += a * p_weight * sum_lanes(sum) + b * block_u;
        if (family == Family::skew_forward_kl) D += p_weight * sum_lanes(sum);
        if (family == Family::skew_reverse_kl) D += q_weight * sum_lanes(sum);
        if (family == Family::tvd) D += 0.5 * sum_lanes(sum);
    }
    MixtureSums sums;
    if (!::isfinite(f.q.z + f.p.z)) D = __builtin_nan("");  // which the logarithms above do not pass on
    // JSD has no such sum: what the roundings of `constant` and of q's share add to the logarithms is taken off
    if (family == Family::jsd) sums.D = kLn2 * (D + a * (shift - static_cast<float>(shift))) + (static_cast<float>(b) - b);
    else if (family == Family::tvd) sums.D = D;
    else sums.D = kLn2 * D - linear;
    sums.unit = family == Family::jsd || family == Family::skew_reverse_kl ? kLn2f : 1.0f;
    sums.u = u * sums.unit;
    return sums.D < near_below<family>(teacher_share) ? near_mixture<family>(rows, pieces, f, teacher_share, kept) : sums;
}

/// The factor of `mixture`'s u.
inline float mixture_factor(Family family, double teacher_share) {
    const float b = static_cast<float>(1 - teacher_share);
    return family == Family::jsd ? b : family == Family::skew_forward_kl ? -b : family == Family::tvd ? -0.5f : 1.0f;
}

/// The label's entry of tau dD/ds, in double. `known`: the mean of u under q.
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
        case Family::tvd: return -0.5 * q * ((difference > 0 ? 1.0 : difference < 0 ? -1.0 : 0) - known);
    }
    return 0;
}

}  // namespace
}  // namespace pocl
