// The gradient of a row, from the exponentials that the sweeps before have left in scratch.
#pragma once
#include "dense/kl.h"
#include "dense/mixtures.h"

namespace pocl {
namespace {

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
    double known = 0;         // the mean of u = dD/dq under q, in nats; of a small forward KL the excess of p - q
    double pull = 0;          // of reverse KL with terms left out, q's factor in the gradient beside u's
    double pull_out = 0;      // and that of q where the term is left out
    double label_out = 0;     // the label's tau dD/ds / kept where its term is left out
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

template <OwnCe ce>
inline BlockWeights block_weights(Family family, const RowFacts& f, const Values& values, const Maxima& maxima) {
    const Weights& w = values.w;
    BlockWeights out;
    const double q = f.q.weight(maxima.s);
    if (family == Family::forward_kl && values.small) {
        out = {w.d * q * values.known, -w.d, 0};
    } else if (family == Family::forward_kl) {
        out = {w.d * q, -w.d * f.p.weight(maxima.t), 0};
    } else if (family == Family::reverse_kl) {  // q (mean gap - gap): without the normalisers' quotient, and its error
        const double moved = static_cast<double>(maxima.t - maxima.s) - f.max_gap(), slope = w.d * q * kLn2 * f.q.factor;  // fp32 as in the sweep
        out = {slope * (f.moment / f.q.z - moved) + w.d * q * values.pull, -slope, 0};
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
/// at once, and scratch moves through the first cache once, not twice. Only a block's weights know the divergence.
template <OwnCe ce, class G>
struct Gradient {
    Family family;
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
            if (maxima.move_to(kept, block)) weights = block_weights<ce>(family, f, values, maxima);
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
