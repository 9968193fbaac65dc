// D of forward and reverse KL: from the moments of the first sweep, or of near rows by a sweep more with exponentials of its own.
#pragma once
#include "dense/family.h"
#include "dense/near.h"

namespace pocl {
namespace {

constexpr Moment moment_of(Family family) {
    return family == Family::forward_kl ? Moment::of_p : family == Family::reverse_kl ? Moment::of_q : Moment::none;
}

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

/// D of the KL family, from the moments of the first sweep where they are accurate enough.
template <Family family, class S, class T>
inline KlSums kl(const Rows<S, T>& rows, const Pieces& pieces, const RowFacts& f, const Kept& kept) {
    const double mean = f.moment / (family == Family::forward_kl ? f.p.z : f.q.z);
    const double gap = kLn2 * (mean * f.q.factor + f.gap_shift());
    const double D = family == Family::forward_kl ? gap : -gap;
    return D < 0.01 ? small_kl<family>(rows, pieces, f, kept) : KlSums{.D = D};
}

}  // namespace
}  // namespace pocl
