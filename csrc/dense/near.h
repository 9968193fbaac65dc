// What the sums of D from terms none of which is negative share: probabilities and their log-ratio from the logits' differences, where
// differences of probabilities or of moments would have lost their digits.
#pragma once
#include "dense/normalise.h"

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

}  // namespace
}  // namespace pocl
