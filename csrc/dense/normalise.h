// The first sweep over a pair of rows: every normaliser, the entropies, the first moments of log p - log q, and the exponentials
// themselves, which stay in scratch for the gradient.
//
// Exponentials of a block are taken relative to the largest logit of the blocks before it, so that a row needs no sweep for its
// maximum first; a block far above that is swept again. Sums are fp32 within a block and double across blocks.
#pragma once
#include <math.h>

#include "simd/pieces.h"
#include "simd/vector_math.h"

namespace pocl {
namespace {

constexpr float kLowest = -1e37f;  // times min(1, tau): exponents of logits above it are finite, and so are products with them
constexpr float kHighest = 3.0f;   // from here on an exponent's rounding would show in the entropies, where one entry has most of the weight

/// Logits of one side as exponents of 2: x = (logit - max) * factor.
struct Side {
    float factor = 0;          // log2(e) / tau
    float max = -kInf;         // the largest logit so far
    double z = 0;              // sum of 2^x
    double x_sum = 0;          // sum of 2^x * x
    double log2_z() const { return ::log2(z); }
    /// log2 of a logit's probability.
    double log2_of(float logit) const { return (static_cast<double>(logit) - max) * factor - log2_z(); }
    /// What makes a 2^x that was taken with `then` for max a probability.
    double weight(float then) const { return ::exp2((static_cast<double>(then) - max) * factor) / z; }

    /// Takes in a block's maximum. What is to be multiplied onto sums of 2^x so far.
    double raise(float block_max) {
        if (!(block_max > max)) return 1;
        const float before = max;
        max = block_max;
        if (before == -kInf) return 1;
        const double moved = (static_cast<double>(before) - max) * factor;  // what the x of those sums gained
        const double f = ::exp2(moved);
        x_sum = (x_sum + z * moved) * f;
        z *= f;
        return f;
    }
    double entropy() const { return (log2_z() - x_sum / z) * kLn2; }
};

/// Both sides' entries as one side, of one factor.
inline Side joined(Side a, Side b) {
    a.raise(b.max);
    b.raise(a.max);
    a.z += b.z;
    a.x_sum += b.x_sum;
    return a;
}

/// A side's logits to exponents, in registers.
struct Exponents {
    Float factor, max;
    explicit Exponents(const Side& side) : factor(broadcast(side.factor)), max(broadcast(side.max)) {}
    Float operator()(Float logits) const { return (logits - max) * factor; }
};

/// What is known of a row once it was swept.
struct RowFacts {
    float tau = 1, alpha = 0;
    float floor = 0;             // logits this low are handled apart: their exponents might overflow
    Side q, p, ce;               // ce: the student at temperature 1 over its own vocabulary
    double moment = 0;           // sum of 2^x_p * gap, or of 2^x_q * gap; gap = (t - max_t) - (s - max_s)
    bool agree = false;

    // of rows with -inf, see copied_row
    bool s_any = true, t_any = true;  // whether a side has any other logit
    bool compared = true;             // false: nothing is left to D, and it is 0
    bool broken = false;              // by NaN or +inf: D is NaN
    double kept = 1, log_kept = 0;    // the mass of a KL's first side without the terms that are left out

    /// log2(p / q) = ((t - s) - max_gap) * factor + gap_shift.
    float max_gap() const { return p.max - q.max; }
    double gap_shift() const { return ::log2(q.z / p.z); }
};

/// The exponentials of a row, a place each as `Pieces` gives it, and for each block the maxima that they are relative to.
struct Kept {
    float* first;    // 2^x_q
    float* second;   // 2^x_p; with Moment::of_q 2^x_q * gap; the mixtures then put q u there
    float* third;    // CE's, where they are its own
    float* max_s;
    float* max_t;
};

/// The maxima that a block's exponentials are relative to. Most blocks of a row share them, and the weights that follow from them.
struct Maxima {
    float s = __builtin_nanf(""), t = s;
    /// False where they are those of the block before.
    bool move_to(const Kept& kept, std::int64_t block) {
        if (kept.max_s[block] == s && kept.max_t[block] == t) return false;
        s = kept.max_s[block];
        t = kept.max_t[block];
        return true;
    }
};

enum class Moment { none, of_q, of_p };
/// CE's exponentials: not wanted here; summed, but not kept (alpha is 0); q's; q's squares; its own.
enum class OwnCe { no, summed, at_tau_1, at_tau_2, yes };
constexpr bool has_sum(OwnCe ce) { return ce == OwnCe::summed || ce == OwnCe::at_tau_2 || ce == OwnCe::yes; }

struct BlockSums {
    double q, p, ce, x, y, gap;
    float max_s, max_t;
    bool finite() const { return ::isfinite(q + p + ce + x + y + gap); }
};

/// Where no gradient waits for a sweep: see `Gradient` in gradient.h.
struct NoGradient {
    struct Block {
        template <bool Some>
        void piece(std::int64_t) {}
        void finish() {}
    };
    Block block(std::int64_t) { return {}; }
};

/// One block, relative to f's maxima. -inf, NaN and logits too low for a finite exponent leave a sum that is not finite. `waiting` takes
/// from each place of scratch what it needs of it before the place is written.
template <Moment moment, OwnCe ce, class S, class T, class Waiting>
inline BlockSums sum_block(const typename S::Storage* s_row, const typename T::Storage* t_row, Pieces pieces, std::int64_t block,
                           const RowFacts& f, Kept kept, Waiting waiting) {
    Float q_sum = {}, p_sum = {}, ce_sum = {}, x_sum = {}, y_sum = {}, gap_sum = {};
    Float max_s = broadcast(-kInf), max_t = max_s;
    const Float before_s = broadcast(f.q.max), before_t = broadcast(f.p.max), max_gap = broadcast(f.max_gap());
    const Float factor = broadcast(f.q.factor);
    const auto add = [&](Float s, Float t, std::int64_t place) POCL_INLINE {
        max_s = max(s, max_s);
        max_t = max(t, max_t);
        const Float x = s - before_s, y = t - before_t;
        const Float q = exp2_of(x, factor), p = exp2_of(y, factor);
        q_sum += q;
        p_sum += p;
        x_sum += q * x;
        y_sum += p * y;
        F32::store(kept.first + place, q);
        if constexpr (moment == Moment::of_q) {
            const Float product = q * ((t - s) - max_gap);
            gap_sum += product;
            F32::store(kept.second + place, product);
        } else {
            if constexpr (moment == Moment::of_p) gap_sum += p * ((t - s) - max_gap);
            F32::store(kept.second + place, p);
        }
        if constexpr (ce == OwnCe::at_tau_2) ce_sum += q * q;
        if constexpr (ce == OwnCe::summed || ce == OwnCe::yes) {
            const Float c = exp2_of(x, broadcast(kLog2E));
            ce_sum += c;
            if constexpr (ce == OwnCe::yes) F32::store(kept.third + place, c);
        }
    };
    for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t place, auto rest) POCL_INLINE {
        const Two s = load_two<S, rest.value>(s_row + v, count, f.floor), t = load_two<T, rest.value>(t_row + v, count, f.floor);
        if constexpr (!rest.value) {  // the block after this one; behind a row's end lies, mostly, the next row
            fetch(s_row + v + kAhead);
            fetch(t_row + v + kAhead);
            if constexpr (sizeof *s_row == 4) fetch(s_row + v + kAhead + kWidth);
            if constexpr (sizeof *t_row == 4) fetch(t_row + v + kAhead + kWidth);
        } else {  // what fills the vector must be below all else
            const Two s_in = load_two<S, true>(s_row + v, count, kInf), t_in = load_two<T, true>(t_row + v, count, kInf);
            const Float lowest = min(min(s_in.a, s_in.b), min(t_in.a, t_in.b));
            q_sum = select(lowest <= f.floor, broadcast(__builtin_nanf("")), q_sum);
        }
        waiting.template piece<rest.value>(place);
        add(s.a, t.a, place);
        add(s.b, t.b, place + kWidth);
    });
    waiting.finish();
    return {sum_lanes(q_sum), sum_lanes(p_sum), sum_lanes(ce_sum), sum_lanes(x_sum), sum_lanes(y_sum), sum_lanes(gap_sum),
            max_lane(max_s), max_lane(max_t)};
}

/// Moves what was summed so far to new maxima.
template <Moment moment, OwnCe ce>
inline void raise(RowFacts& f, float block_s, float block_t) {
    const double gap_before = f.max_gap();
    if (block_s > f.q.max || block_t > f.p.max) f.agree = false;
    const double scale_q = f.q.raise(block_s), scale_p = f.p.raise(block_t);
    if constexpr (has_sum(ce)) f.ce.raise(block_s);
    const double gap_moved = gap_before - f.max_gap();
    if constexpr (moment == Moment::of_q) f.moment = f.moment * scale_q + (f.q.z > 0 ? f.q.z * gap_moved : 0);
    if constexpr (moment == Moment::of_p) f.moment = f.moment * scale_p + (f.p.z > 0 ? f.p.z * gap_moved : 0);
}

/// The largest of a block's logits.
template <class S>
inline float block_max(const typename S::Storage* row, const Pieces& pieces, std::int64_t block) {
    Float largest = broadcast(-kInf);
    for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t, auto rest) POCL_INLINE {
        const Two x = load_two<S, rest.value>(row + v, count, -kInf);
        largest = max(x.a, max(x.b, largest));
    });
    return max_lane(largest);
}

/// Sums of a row of fp32 logits; -inf adds nothing.
inline Side side_of(const float* row, std::int64_t V, float factor) {
    Side side{.factor = factor};
    for (std::int64_t block = 0; block < V; block += kBlock) {
        const std::int64_t stop = block + kBlock < V ? block + kBlock : V;
        Float largest = broadcast(-kInf);
        for_vectors(block, stop, [&](std::int64_t v, int count, auto rest) {
            largest = max(load<F32, rest.value>(row + v, count, -kInf), largest);
        });
        side.raise(max_lane(largest));
        const Float top = broadcast(side.max == -kInf ? 0.0f : side.max), lowest = broadcast(-1000.0f);  // 0 times it is 0
        Float sum = {}, x_sum = {};
        for_vectors(block, stop, [&](std::int64_t v, int count, auto rest) {
            const Float x = max(lowest, (load<F32, rest.value>(row + v, count, -kInf) - top) * factor), q = exp2_of(x);
            sum += q;
            x_sum += q * x;
        });
        side.z += sum_lanes(sum);
        side.x_sum += sum_lanes(x_sum);
    }
    return side;
}

enum class Unfit { stops, goes_on };  // at a logit that leaves no finite sum; a NaN's sums are to become NaN

/// Sweeps a pair of rows. False where it stopped: the row must then be swept as a copy without such logits.
template <Moment moment, OwnCe ce, class S, class T, class Waiting = NoGradient>
inline bool normalise(const typename S::Storage* s_row, const typename T::Storage* t_row, const Pieces& pieces, const Kept& kept, RowFacts& f,
                      Unfit unfit, Waiting&& waiting = {}) {
    raise<Moment::none, ce>(f, block_max<S>(s_row, pieces, 0), block_max<T>(t_row, pieces, 0));
    for (std::int64_t block = 0; block < pieces.blocks(); ++block) {
        BlockSums sums = sum_block<moment, ce, S, T>(s_row, t_row, pieces, block, f, kept, waiting.block(block));
        const float steepest = f.q.factor > kLog2E ? f.q.factor : kLog2E;
        if ((sums.max_s - f.q.max) * steepest > kHighest || (sums.max_t - f.p.max) * steepest > kHighest) {
            raise<moment, ce>(f, sums.max_s, sums.max_t);
            sums = sum_block<moment, ce, S, T>(s_row, t_row, pieces, block, f, kept, NoGradient::Block{});
        }
        kept.max_s[block] = f.q.max;
        kept.max_t[block] = f.p.max;
        if (unfit == Unfit::stops && !sums.finite()) return false;
        f.q.z += sums.q;
        f.p.z += sums.p;
        f.q.x_sum += sums.x * f.q.factor;
        f.p.x_sum += sums.y * f.p.factor;
        if constexpr (moment != Moment::none) f.moment += sums.gap;
        if constexpr (has_sum(ce)) f.ce.z += sums.ce;
        raise<moment, ce>(f, sums.max_s, sums.max_t);
        if (!f.agree && sums.max_s == f.q.max && sums.max_t == f.p.max) {
            Int both = {};
            for_pieces(pieces, block, [&](std::int64_t v, int count, std::int64_t, auto rest) POCL_INLINE {
                const Two s = load_two<S, rest.value>(s_row + v, count, -kInf), t = load_two<T, rest.value>(t_row + v, count, -kInf);
                both |= ((s.a == sums.max_s) & (t.a == sums.max_t)) | ((s.b == sums.max_s) & (t.b == sums.max_t));
            });
            f.agree = any(both);
        }
    }
    return true;
}

/// Takes [begin, end) of the student's logits into CE's normaliser alone; -inf adds nothing.
template <class S>
inline void normalise_ce(const typename S::Storage* row, std::int64_t begin, std::int64_t end, Side& ce) {
    for (std::int64_t block = begin; block < end; block += kBlock) {
        const std::int64_t stop = block + kBlock < end ? block + kBlock : end;
        Float largest = broadcast(-kInf);
        Int nan = {};
        for_vectors(block, stop, [&](std::int64_t v, int count, auto rest) {
            const Float x = load<S, rest.value>(row + v, count, -kInf);
            largest = max(x, largest);
            nan |= x != x;
        });
        if (any(nan)) ce.z = __builtin_nan("");
        ce.raise(max_lane(largest));
        if (ce.max == -kInf) continue;  // nothing so far, and -inf - -inf would be NaN
        const Exponents exponents(ce);
        Float sum = {};
        for_vectors(block, stop, [&](std::int64_t v, int count, auto rest) {
            sum += exp2_of(exponents(load<S, rest.value>(row + v, count, -kInf)));
        });
        ce.z += sum_lanes(sum);
    }
}

}  // namespace
}  // namespace pocl
