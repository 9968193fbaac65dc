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
    constexpr float tiny = 1.17549435e-38f;  // in the place of a 0, whose logarithm would be NaN times 0
    const Float a = broadcast(static_cast<float>(teacher_share)), b = broadcast(static_cast<float>(1 - teacher_share));
    const Float max_gap = broadcast(f.max_gap()), factor = broadcast(f.q.factor), gap_shift = broadcast(static_cast<float>(f.gap_shift()));
    const Float most = broadcast(static_cast<float>(-::log2(teacher_share)));
    double q_weight = 0, p_weight = 0;
    double of_q = 0, of_p = 0, linear = 0, u = 0;  // sums of q log2(q/m) and p log2(p/m), or of |p - q|; of q - m or p - m; of q u
    for (std::int64_t block = 0; block < pieces.blocks(); ++block) {
        if (block == 0 || kept.max_s[block] != kept.max_s[block - 1]) q_weight = f.q.weight(kept.max_s[block]);
        if (block == 0 || kept.max_t[block] != kept.max_t[block - 1]) p_weight = f.p.weight(kept.max_t[block]);
        const Float to_q = broadcast(static_cast<float>(q_weight)), to_p = broadcast(static_cast<float>(p_weight));
        Float q_sum = {}, p_sum = {}, linear_sum = {}, u_sum = {};
        const auto add = [&](Float s, Float t, std::int64_t place) POCL_INLINE {
            const Float kept_q = F32::load(kept.first + place), q = kept_q * to_q, p = F32::load(kept.second + place) * to_p;
            Float product;
            if constexpr (family == Family::tvd) {
                const Float difference = p - q;
                p_sum += magnitude(difference);
                product = select(q == p, Float{}, with_sign_of(difference, kept_q));
            } else {
                const Float m = max(broadcast(tiny), fma(a, p, b * q));
                if constexpr (family == Family::jsd) {
                    const Float log_ratio = log2_of(max(broadcast(tiny), q / m)), gap = fma((t - s) - max_gap, factor, gap_shift);
                    p_sum += p * min(most, log_ratio + gap);  // log2(p/m) is at most log2(1/a), which it is where q underflows
                    q_sum += q * log_ratio;
                    product = kept_q * log_ratio;
                } else if constexpr (family == Family::skew_forward_kl) {
                    const Float ratio = p / m;
                    p_sum += p * log2_of(max(broadcast(tiny), ratio));
                    linear_sum += p - m;
                    product = kept_q * (ratio - 1.0f);
                } else {
                    const Float ratio = q / m, log_ratio = log2_of(max(broadcast(tiny), ratio));
                    q_sum += q * log_ratio;
                    linear_sum += q - m;
                    product = kept_q * fma(b * kLog2E, 1.0f - ratio, log_ratio);  // b (1 - q/m) = a (p/m - 1)
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
        of_q += sum_lanes(q_sum);
        of_p += sum_lanes(p_sum);
        linear += sum_lanes(linear_sum);
        u += q_weight * sum_lanes(u_sum);
    }
    MixtureSums sums;
    if (!::isfinite(f.q.z + f.p.z)) of_q = of_p = __builtin_nan("");  // which the logarithms above do not pass on
    // `linear` is 0 but for rounding: without it, D would keep the rounding of p and m
    if (family == Family::jsd) sums.D = kLn2 * (teacher_share * of_p + (1 - teacher_share) * of_q);
    if (family == Family::skew_forward_kl) sums.D = kLn2 * of_p - linear;
    if (family == Family::skew_reverse_kl) sums.D = kLn2 * of_q - linear;
    if (family == Family::tvd) sums.D = 0.5 * of_p;
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

/// `known`: the mean of a mixture's u under q, in nats; of a small forward KL the excess of p - q, which then is what scratch holds.
template <Family family, OwnCe ce>
inline BlockWeights block_weights(const RowFacts& f, const Weights& w, float max_s, float max_t, double known, float factor, float unit,
                                  bool small) {
    BlockWeights out;
    const double q = f.q.weight(max_s);
    if (family == Family::forward_kl && small) {
        out = {w.d * q * known, -w.d, 0};
    } else if constexpr (family == Family::forward_kl) {
        out = {w.d * q, -w.d * f.p.weight(max_t), 0};
    } else if constexpr (family == Family::reverse_kl) {  // q (mean gap - gap): without the normalisers' quotient, and its error
        const double moved = static_cast<double>(max_t - max_s) - f.max_gap(), slope = w.d * q * kLn2 * f.q.factor;  // fp32 as in the sweep
        out = {slope * (f.moment / f.q.z - moved), -slope, 0};
    } else {
        out = {w.d * factor * q * -known, w.d * factor * q * unit, 0};
    }
    if (w.ce == 0.0f || ce == OwnCe::no || ce == OwnCe::summed) return out;
    const double of_ce = w.ce * f.ce.weight(max_s);
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
    Weights w;                // w.d is over the temperature
    double known;             // see `block_weights`
    float factor, unit;
    bool small;
    Output<G> out;
    std::int64_t next = 0;    // block
    BlockWeights weights{};   // of the last block, whose maxima these are; most blocks share them
    float max_s = __builtin_nanf(""), max_t = max_s;

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
            if (kept.max_s[block] != max_s || kept.max_t[block] != max_t) {
                max_s = kept.max_s[block];
                max_t = kept.max_t[block];
                weights = block_weights<family, ce>(f, w, max_s, max_t, known, factor, unit, small);
            }
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
