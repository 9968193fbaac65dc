// The first sweep over a pair of rows: every normaliser, the entropies and the first moments of log p - log q, online.
//
// Block by block, so that a row is read once from memory: a block's maxima come first, then its sums while it is in the first-level
// cache. Sums are fp32 within a block and double across blocks; a block with a larger maximum moves what was summed before.
#pragma once
#include <math.h>

#include "divergence/vector_math.h"

namespace pocl {
namespace {

constexpr std::int64_t kBlock = 2048;
constexpr float kLowest = -1e37f;  // times min(1, tau): exponents of logits above it are finite, and so are products with them

/// Calls body(position, count, Whole) over the whole vectors of [begin, end), then body(position, count, Rest) for what remains.
struct Whole { static constexpr bool value = false; };
struct Rest { static constexpr bool value = true; };
template <class Body>
inline void for_vectors(std::int64_t begin, std::int64_t end, Body&& body) {
    std::int64_t v = begin;
    for (; v + kWidth <= end; v += kWidth) body(v, kWidth, Whole{});
    if (v < end) body(v, static_cast<int>(end - v), Rest{});
}

template <class Format, bool Some>
inline Float load(const typename Format::Storage* row, std::int64_t v, int count, float fill) {
    if constexpr (Some) return load_some<Format>(row + v, count, fill);
    else return Format::load(row + v);
}

/// Has the cache take in a line, which need not be the program's own memory.
inline void fetch(const void* line) { __builtin_prefetch(line, 0, 3); }

/// Logits of one side as exponents of 2: x = (logit - max) * factor.
struct Side {
    float factor = 0;          // log2(e) / tau
    float max = -kInf;         // the largest logit so far
    double z = 0;              // sum of 2^x
    double x_sum = 0;          // sum of 2^x * x
    double log2_z() const { return ::log2(z); }
    /// log2 of a logit's probability.
    double log2_of(float logit) const { return (static_cast<double>(logit) - max) * factor - log2_z(); }

    /// Takes in a block's maximum. What is to be multiplied onto sums of 2^x so far; `moved` is what their x gained.
    double raise(float block_max, double& moved) {
        moved = 0;
        if (block_max <= max) return 1;
        const float before = max;
        max = block_max;
        if (before == -kInf) return 1;
        moved = (static_cast<double>(before) - max) * factor;
        const double f = ::exp2(moved);
        x_sum = (x_sum + z * moved) * f;
        z *= f;
        return f;
    }
    double entropy() const { return (log2_z() - x_sum / z) * kLn2; }
};

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
    double q_moment = 0, p_moment = 0;  // sum of 2^x_q * gap and of 2^x_p * gap, gap = (t - max_t) - (s - max_s)
    bool agree = false;
    bool all_out = false;        // no entry is left to D

    /// log2(p / q) = ((t - s) - max_gap) * factor + gap_shift.
    float max_gap() const { return p.max - q.max; }
    double gap_shift() const { return ::log2(q.z / p.z); }
};

enum class Moment { none, of_q, of_p };
enum class OwnCe { no, at_tau_1, at_tau_2, yes };  // whether CE's exponentials are q's, their squares, its own, or not wanted here

/// Sweeps V pairs of logits. False where one is at or below the floor: the row must then be swept as a copy without such logits.
template <Moment moment, OwnCe ce, class S, class T>
inline bool normalise(const typename S::Storage* s_row, const typename T::Storage* t_row, std::int64_t V, RowFacts& f) {
    for (std::int64_t block = 0; block < V; block += kBlock) {
        const std::int64_t end = block + kBlock < V ? block + kBlock : V;
        Float max_s = broadcast(-kInf), max_t = max_s, lowest = broadcast(kInf);
        for_vectors(block, end, [&](std::int64_t v, int count, auto rest) {
            const Float s = load<S, rest.value>(s_row, v, count, f.floor), t = load<T, rest.value>(t_row, v, count, f.floor);
            max_s = max(s, max_s);
            max_t = max(t, max_t);
            if constexpr (rest.value) {
                for (int i = 0; i < count; ++i) {
                    const float less = s[i] < t[i] ? s[i] : t[i];
                    lowest[i] = less < lowest[i] ? less : lowest[i];
                }
            } else {
                lowest = min(s, min(t, lowest));
            }
        });
        if (any(lowest <= f.floor)) return false;
        const float block_s = max_lane(max_s), block_t = max_lane(max_t);
        double moved_q, moved_p, moved_ce;
        const float old_s = f.q.max, old_t = f.p.max;
        const double gap_before = f.max_gap();
        const double scale_q = f.q.raise(block_s, moved_q), scale_p = f.p.raise(block_t, moved_p);
        if constexpr (ce == OwnCe::at_tau_2 || ce == OwnCe::yes) f.ce.raise(block_s, moved_ce);
        if (block > 0) {
            const double gap_moved = gap_before - f.max_gap();
            if constexpr (moment == Moment::of_q) f.q_moment = f.q_moment * scale_q + f.q.z * gap_moved;
            if constexpr (moment == Moment::of_p) f.p_moment = f.p_moment * scale_p + f.p.z * gap_moved;
        }
        Float q_sum = {}, p_sum = {}, ce_sum = {}, x_sum = {}, y_sum = {}, gap_sum = {};
        const Float max_gap = broadcast(f.max_gap());
        const Exponents exponents_q(f.q), exponents_p(f.p), exponents_ce(f.ce);
        for_vectors(block, end, [&](std::int64_t v, int count, auto rest) {
            const Float s = load<S, rest.value>(s_row, v, count, f.floor), t = load<T, rest.value>(t_row, v, count, f.floor);
            if constexpr (!rest.value) {  // the block after this one; behind a row's end lies, mostly, the next row
                fetch(s_row + v + kBlock);
                fetch(t_row + v + kBlock);
            }
            const Float x = exponents_q(s), y = exponents_p(t);
            const Float q = exp2_of(x), p = exp2_of(y);
            q_sum += q;
            p_sum += p;
            x_sum += q * x;
            y_sum += p * y;
            if constexpr (moment == Moment::of_q) gap_sum += q * ((t - s) - max_gap);
            if constexpr (moment == Moment::of_p) gap_sum += p * ((t - s) - max_gap);
            if constexpr (ce == OwnCe::at_tau_2) ce_sum += q * q;
            if constexpr (ce == OwnCe::yes) ce_sum += exp2_of(exponents_ce(s));
        });
        f.q.z += sum_lanes(q_sum);
        f.p.z += sum_lanes(p_sum);
        f.q.x_sum += sum_lanes(x_sum);
        f.p.x_sum += sum_lanes(y_sum);
        if constexpr (moment == Moment::of_q) f.q_moment += sum_lanes(gap_sum);
        if constexpr (moment == Moment::of_p) f.p_moment += sum_lanes(gap_sum);
        if constexpr (ce == OwnCe::at_tau_2 || ce == OwnCe::yes) f.ce.z += sum_lanes(ce_sum);
        if (old_s != f.q.max || old_t != f.p.max) f.agree = false;
        if (!f.agree && block_s == f.q.max && block_t == f.p.max) {
            Int both = {};
            for_vectors(block, end, [&](std::int64_t v, int count, auto rest) {
                const Float s = load<S, rest.value>(s_row, v, count, -kInf), t = load<T, rest.value>(t_row, v, count, -kInf);
                both |= (s == block_s) & (t == block_t);
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
            const Float x = load<S, rest.value>(row, v, count, -kInf);
            largest = max(x, largest);
            nan |= x != x;
        });
        if (any(nan)) ce.z = __builtin_nan("");
        double moved;
        ce.raise(max_lane(largest), moved);
        if (ce.max == -kInf) continue;  // nothing so far, and -inf - -inf would be NaN
        const Exponents exponents(ce);
        Float sum = {};
        for_vectors(block, stop, [&](std::int64_t v, int count, auto rest) {
            sum += exp2_of(exponents(load<S, rest.value>(row, v, count, -kInf)));
        });
        ce.z += sum_lanes(sum);
    }
}

}  // namespace
}  // namespace pocl
