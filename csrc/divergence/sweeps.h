// What follows the first sweep over a pair of rows: D, and the gradient from the exponentials that it left in scratch.
#pragma once
#include "divergence/near.h"

namespace pocl {
namespace {

// ---- D ------------------------------------------------------------------------------------------------------------------

/// D of the KL family, from the moments of the first sweep where they are accurate enough.
template <Family family, class S, class T>
inline KlSums kl(const Rows<S, T>& rows, const Pieces& pieces, const RowFacts& f, const Kept& kept) {
    const double mean = f.moment / (family == Family::forward_kl ? f.p.z : f.q.z);
    const double gap = kLn2 * (mean * f.q.factor + f.gap_shift());
    const double D = family == Family::forward_kl ? gap : -gap;
    return D < 0.01 ? small_kl<family>(rows, pieces, f, kept) : KlSums{.D = D};
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

// ---- the gradient -------------------------------------------------------------------------------------------------------

/// Where the gradient of a row goes, in the student's dtype; past the caches where it is too large to stay in them anyway.
template <class G>
struct Output {
    typename G::Storage* row;
    bool stream;

    template <bool Some>
    void put(std::int64_t v, int count, Two g) const {
        if constexpr (Some) store_some_two<G>(row + v, g, count);
        else if (stream) G::stream_two(row + v, g);
        else G::store_two(row + v, g);
    }
    /// Elements before the first at which a streaming store, which must be aligned, is possible.
    std::int64_t head() const {
        constexpr std::uintptr_t bytes = sizeof(Float);
        const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(row) % bytes;
        return stream && past > 0 ? static_cast<std::int64_t>((bytes - past) / sizeof(typename G::Storage)) : 0;
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

/// D, CE and the gradient's weights of a row.
struct Values {
    double D = 0, ce = 0;
    double known = 0;         // the mean of a mixture's u under q, in nats; of a small forward KL the excess of p - q
    bool small = false;       // whether `small_kl` found D; of forward KL scratch then holds p - q
    float unit = 1;           // of a mixture's u in scratch, see MixtureSums
    float factor = 1;         // of a mixture's u in the gradient
    bool no_softmax = false;  // nothing but -inf: CE is infinite and nothing can lower it
    Weights w;                // w.d is over the temperature
};

/// CE's gradient from its logits.
struct CrossEntropy {
    Exponents exponents;
    Float weight;  // over the normaliser
    CrossEntropy(const RowFacts& f, const Weights& w)
        : exponents(f.ce), weight(broadcast(w.ce == 0.0f ? 0.0f : static_cast<float>(w.ce / f.ce.z))) {}
    Float gradient(Float c) const { return weight * exp2_of(exponents(c)); }
};

/// CE's gradient alone over [begin, end); zeros where CE has no weight.
template <class S, class G>
inline void ce_gradient(const typename S::Storage* row, std::int64_t begin, std::int64_t end, const RowFacts& f, const Weights& w,
                        typename G::Storage* out) {
    const CrossEntropy ce(f, w);
    for_vectors(begin, end, [&](std::int64_t v, int count, auto rest) {
        const Float g = w.ce == 0.0f ? Float{} : ce.gradient(load<S, rest.value>(row + v, count, -kInf));
        store<G, rest.value>(out + v, g, count);
    });
}

/// What a block's exponentials are multiplied by: the gradient is their sum.
struct BlockWeights {
    double first = 0, second = 0, third = 0;
};

template <Family family, OwnCe ce>
inline BlockWeights block_weights(const RowFacts& f, const Values& values, const Maxima& maxima) {
    const Weights& w = values.w;
    BlockWeights out;
    const double q = f.q.weight(maxima.s);
    if (family == Family::forward_kl && values.small) {
        out = {w.d * q * values.known, -w.d, 0};
    } else if constexpr (family == Family::forward_kl) {
        out = {w.d * q, -w.d * f.p.weight(maxima.t), 0};
    } else if constexpr (family == Family::reverse_kl) {  // q (mean gap - gap): without the normalisers' quotient, and its error
        const double moved = static_cast<double>(maxima.t - maxima.s) - f.max_gap(), slope = w.d * q * kLn2 * f.q.factor;  // fp32 as in the sweep
        out = {slope * (f.moment / f.q.z - moved), -slope, 0};
    } else {
        const double slope = w.d * q * values.factor;
        out = {slope * -values.known, slope * values.unit, 0};
    }
    if (w.ce == 0.0f || ce == OwnCe::no || ce == OwnCe::summed) return out;
    const double of_ce = w.ce * f.ce.weight(maxima.s);
    if constexpr (ce == OwnCe::at_tau_1) out.first += of_ce;
    else out.third = of_ce;
    return out;
}

/// The gradient of a row over the shared vocabulary, from what the sweeps before have kept, block by block. It can wait until the next
/// row of logits is swept, piece by piece before that row's exponentials take the places of this one's: memory is then read and written
/// at once, and scratch moves through the first cache once, not twice.
template <Family family, OwnCe ce, class G>
struct Gradient {
    Kept kept;
    Pieces pieces;
    const RowFacts& f;
    const Values& values;
    Output<G> out;
    std::int64_t next = 0;    // block
    Maxima maxima{};          // of the last block
    BlockWeights weights{};

    struct Block {
        const float *q, *second, *third;
        Float q_weight, second_weight, third_weight;
        Output<G> out;
        Pieces pieces;
        std::int64_t v, end;  // what is not yet written

        Float at(std::int64_t place) const {
            const Float x = F32::load(q + place);
            Float g = fma(q_weight, x, second_weight * F32::load(second + place));
            if constexpr (ce == OwnCe::at_tau_2) g = fma(third_weight, x * x, g);
            if constexpr (ce == OwnCe::yes) g = fma(third_weight, F32::load(third + place), g);
            return g;
        }
        /// Writes the piece at `place`, where there is one. `Some`: it may have another length than `kTwo`.
        template <bool Some>
        POCL_INLINE void piece(std::int64_t place) {
            if (!Some && v + kTwo <= end) {
                out.template put<false>(v, kTwo, Two{at(place), at(place + kWidth)});
                v += kTwo;
            } else if (v < end) {
                v = put_some(*this, place);
            }
        }
        /// Where the piece ends. A copy of the block, for one whose address is known would be kept in memory.
        __attribute__((noinline)) static std::int64_t put_some(Block block, std::int64_t place) {
            const std::int64_t whole = block.v < block.pieces.head ? block.pieces.head : block.v + kTwo, stop = whole < block.end ? whole : block.end;
            block.out.template put<true>(block.v, static_cast<int>(stop - block.v), Two{block.at(place), block.at(place + kWidth)});
            return stop;
        }
        void finish() {
            while (v < end) piece<true>(pieces.place(v));
        }
    };

    /// The next block, which is `block`; without pieces where the row has fewer.
    Block block(std::int64_t block) {
        const bool any = block < pieces.blocks();
        if (any) {
            if (maxima.move_to(kept, block)) weights = block_weights<family, ce>(f, values, maxima);
            next = block + 1;
        }
        return {kept.first, kept.second, kept.third, broadcast(static_cast<float>(weights.first)), broadcast(static_cast<float>(weights.second)),
                broadcast(static_cast<float>(weights.third)), out, pieces, any ? pieces.begin(block) : 0, any ? pieces.end(block) : 0};
    }

    /// All blocks that are left.
    void finish() {
        while (next < pieces.blocks()) {
            Block now = block(next);
            for_pieces(pieces, next - 1, [&](std::int64_t, int, std::int64_t place, auto rest) POCL_INLINE { now.template piece<rest.value>(place); });
        }
    }
};

}  // namespace
}  // namespace pocl
