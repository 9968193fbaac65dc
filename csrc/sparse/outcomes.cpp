#include "sparse/outcomes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

namespace pocl {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

/// exp(value - largest) of some values, and their sums; -inf counts for nothing.
struct Softmax {
    double largest = kNone, sum = 0;
    double moment = 0;  // of exp(value - largest) * value
    double log_z() const { return sum == 0 ? kNone : largest + std::log(sum); }
};

Softmax softmax(const double* values, std::int64_t count, double* exponentials) {
    Softmax out;
    for (std::int64_t i = 0; i < count; ++i) out.largest = std::max(out.largest, values[i]);
    for (std::int64_t i = 0; i < count; ++i) {
        exponentials[i] = values[i] == kNone ? 0 : std::exp(values[i] - out.largest);
        out.sum += exponentials[i];
        if (values[i] != kNone) out.moment += exponentials[i] * values[i];
    }
    return out;
}

/// log(e^a + e^b).
double log_add(double a, double b) {
    if (a == kNone || b == kNone) return a == kNone ? b : a;
    return std::max(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

/// sum of exp(value)^factor; no exponential is taken again where factor is 1 or 2.
double sum_of_powers(const Softmax& s, const double* values, const double* exponentials, std::int64_t count, double factor) {
    if (factor == 1) return s.sum == 0 ? 0 : s.sum * std::exp(s.largest);
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i)
        sum += factor == 2 ? exponentials[i] * exponentials[i] : std::exp(values[i] * factor);
    return factor == 2 && sum != 0 ? sum * std::exp(2 * s.largest) : sum;
}

constexpr double kLeastMass = 0x1p-23;  // of a teacher's rest: below it is the rounding of K fp32 log-probabilities
constexpr double kLeastOfFiltered = 0x1p-20;  // where some of them are -inf

/// log of the weight at temperature `tau` of n entries that share `mass` evenly: log(n (mass/n)^(1/tau)); none below `least`.
double log_shared(double mass, std::int64_t n, double least, double tau) {
    if (n <= 0 || mass < least) return kNone;
    const double log_n = std::log(static_cast<double>(n));
    return log_n + (std::log(mass) - log_n) / tau;
}

/// a log(a/b) - a + b, the terms of KL(a||b): none is negative, and a and b sum to the same. `gap` is log(a/b), `difference` a - b.
double kl_term(double a, double gap, double difference) { return a > 0 ? a * gap - difference : -difference; }

/// An outcome's term of D, and u = dD/dq but for a constant that all outcomes share.
struct Term {
    double d, u;
};

/// `gap` is log(p/q), infinite where one of them is 0 by its logit; but for terms that would be infinite.
Term term(Family family, double a, double p, double q, double gap) {
    const double b = 1 - a, difference = p - q;
    if (family == Family::forward_kl) return {kl_term(p, gap, difference), 0};
    if (family == Family::reverse_kl) return {kl_term(q, -gap, -difference), -gap};
    if (family == Family::tvd) return {0.5 * std::fabs(difference), gap < 0 ? 0.5 : gap > 0 ? -0.5 : gap};
    const double larger = gap > 0 ? p : q;
    const double e = larger == 0 ? 0 : -std::fabs(difference) / larger;  // the smaller over the larger, less 1
    const double w = (gap > 0 ? b : a) * e;                               // m over the larger, less 1
    const double log_m = std::log1p(w);                                   // log(m / the larger)
    const double log_p_m = (gap < 0 ? gap : 0) - log_m, log_q_m = (gap > 0 ? -gap : 0) - log_m;
    const double ratio = (gap > 0 ? -b : b) * e / (1 + w);                // p/m - 1
    const double of_p = kl_term(p, log_p_m, b * difference), of_q = kl_term(q, log_q_m, -a * difference);
    switch (family) {
        case Family::jsd: return {a * of_p + b * of_q, b * log_q_m};
        case Family::skew_forward_kl: return {of_p, -b * ratio};
        case Family::skew_reverse_kl: return {of_q, log_q_m + a * ratio};
        case Family::forward_kl: case Family::reverse_kl: case Family::tvd: break;  // returned above
    }
    return {};
}

/// D of the outcomes, without those of its terms that would be infinite, and scratch.gradient = q (u - mean of u). `zeros`: whether any p or
/// q is 0 by its logit.
template <bool zeros>
double compare(const SparseTask& task, const SparseScratch& at, std::int64_t count) {
    const bool forward = task.family == Family::forward_kl, reverse = task.family == Family::reverse_kl;
    double D = 0, mean = 0, kept = 0;
    bool left_out = false;
    for (std::int64_t i = 0; i < count; ++i) {
        const bool no_q = zeros && at.log_q[i] == kNone, no_p = zeros && at.log_p[i] == kNone;
        at.gradient[i] = 0;
        if (no_q && no_p) continue;
        Term t;
        if ((forward && no_q) || (reverse && no_p)) {
            t = {forward ? -at.p[i] : -at.q[i], -1};  // a log(a/b) - a + b without its logarithm
            left_out = true;
        } else {
            t = term(task.family, task.teacher_share, at.p[i], at.q[i], no_q ? -kNone : at.log_p[i] - at.log_q[i]);
            if (zeros) kept += at.p[i];
        }
        D += t.d;
        if (at.q[i] != 0) mean += at.q[i] * t.u;  // u may be infinite where q is 0
        at.gradient[i] = forward ? at.q[i] - at.p[i] : t.u;
    }
    if (forward && left_out) {
        for (std::int64_t i = 0; i < count; ++i) at.gradient[i] = at.log_q[i] == kNone ? 0 : at.q[i] * kept - at.p[i];
    } else if (!forward) {
        for (std::int64_t i = 0; i < count; ++i) at.gradient[i] = at.q[i] == 0 ? 0 : at.q[i] * (at.gradient[i] - mean);
    }
    return D < 0 && !left_out ? 0 : D;
}

/// Whether a listed entry of the teacher's largest log-probability has the student's largest logit.
bool agreement(const float* log_probs, const double* s, std::int64_t K, double largest) {
    float best = -std::numeric_limits<float>::infinity();
    bool agree = false;
    for (std::int64_t j = 0; j < K; ++j) {
        if (log_probs[j] == -std::numeric_limits<float>::infinity() || log_probs[j] < best) continue;
        agree = (agree && log_probs[j] == best) || (s[j] == largest && s[j] != kNone);
        best = log_probs[j];
    }
    return agree;
}

/// The student's softmax at both temperatures over its whole vocabulary. Leaves logarithms of weights in log_q and exponentials in q.
Softmax sum_student(double tau, std::int64_t K, const RestSums& rest, const SparseScratch& at, RowSums& out) {
    for (std::int64_t j = 0; j < K; ++j) at.log_q[j] = at.s[j] / tau;
    const Softmax listed = softmax(at.log_q, K, at.q);
    Softmax listed_ce = listed;
    if (tau == 1) {
        std::copy_n(at.q, K, at.ce);
    } else if (tau == 2) {
        listed_ce = {2 * listed.largest, 0, 0};
        for (std::int64_t j = 0; j < K; ++j) listed_ce.sum += at.ce[j] = at.q[j] * at.q[j];
    } else {
        listed_ce = softmax(at.s, K, at.ce);
    }
    out.log_rest = rest.z == 0 ? kNone : rest.max / tau + std::log(rest.z);
    const double log_rest_ce = rest.z_ce == 0 ? kNone : rest.max + std::log(rest.z_ce);
    out.log_z_ce = log_add(listed_ce.log_z(), log_rest_ce);
    const double to_probability = listed_ce.sum == 0 ? 0 : std::exp(listed_ce.largest - out.log_z_ce);
    for (std::int64_t j = 0; j < K; ++j) at.ce[j] *= to_probability;
    out.rest_ce = rest.z_ce == 0 ? 0 : std::exp(log_rest_ce - out.log_z_ce);

    const double log_z = log_add(listed.log_z(), out.log_rest);
    out.student_entropy = log_z == kNone ? 0 : log_z;
    if (listed.sum != 0) out.student_entropy -= std::exp(listed.log_z() - log_z) * listed.moment / listed.sum;
    if (rest.z != 0) out.student_entropy -= std::exp(out.log_rest - log_z) * (rest.max / tau + std::numbers::ln2 * rest.x_sum / rest.z);
    return listed;
}

/// The teacher's weights: logarithms in log_p and exponentials in p; of the rest the logarithm alone.
Softmax sum_teacher(const SparseTask& task, const float* log_probs, double tau, const SparseScratch& at) {
    const std::int64_t K = task.K;
    std::int64_t others = task.student.columns;
    for (std::int64_t j = 0; j < K; ++j) {
        at.log_p[j] = log_probs[j] / tau;
        if (at.log_p[j] != kNone) --others;
    }
    const Softmax listed = softmax(at.log_p, K, at.p);
    at.log_p[K] = kNone;
    const double least = others > task.student.columns - K ? kLeastOfFiltered : kLeastMass;
    if (task.tail == Tail::bucket) at.log_p[K] = log_shared(1 - sum_of_powers(listed, at.log_p, at.p, K, tau), others, least, tau);
    return listed;
}

/// Weights to probabilities, of the listed entries and of the rest; false, and 0, where all are -inf. The largest is subtracted first and the
/// logarithm of the sum after it: together they would lose that logarithm where all weights are as small as a mask's exp(-1e30).
bool normalise_outcomes(double* log_weights, double* exponentials, std::int64_t K, const Softmax& listed) {
    if (listed.sum == 0 && log_weights[K] == kNone) {
        std::fill_n(exponentials, K + 1, 0.0);
        return false;
    }
    const double shift = std::max(listed.largest, log_weights[K]);
    const double scale = listed.sum == 0 ? 0 : std::exp(listed.largest - shift);
    const double sum = listed.sum * scale + (log_weights[K] == kNone ? 0 : std::exp(log_weights[K] - shift));
    const double log_sum = std::log(sum);
    for (std::int64_t j = 0; j < K; ++j) {
        if (log_weights[j] != kNone) log_weights[j] = (log_weights[j] - shift) - log_sum;
        exponentials[j] *= scale / sum;
    }
    if (log_weights[K] != kNone) log_weights[K] = (log_weights[K] - shift) - log_sum;
    exponentials[K] = std::exp(log_weights[K]);
    return true;
}

}  // namespace

RowSums compare_outcomes(const SparseTask& task, std::int64_t n, const RestSums& rest, const SparseScratch& at) noexcept {
    const std::int64_t K = task.K;
    const float* const log_probs = task.log_probs + n * K;
    const double tau = task.temperature[n];
    RowSums out;
    const Softmax listed_q = sum_student(tau, K, rest, at, out), listed_p = sum_teacher(task, log_probs, tau, at);
    double largest = rest.z == 0 ? kNone : rest.max;
    for (std::int64_t j = 0; j < K; ++j) largest = std::max(largest, at.s[j]);
    out.largest = static_cast<float>(largest);
    out.agree = agreement(log_probs, at.s, K, largest);

    at.log_q[K] = task.tail == Tail::renormalise ? kNone : out.log_rest;
    const bool any_q = normalise_outcomes(at.log_q, at.q, K, listed_q), any_p = normalise_outcomes(at.log_p, at.p, K, listed_p);
    for (std::int64_t i = 0; i <= K; ++i)
        if (at.p[i] != 0) out.teacher_entropy -= at.p[i] * at.log_p[i];
    if (any_q && any_p) {
        const bool bucket = at.log_q[K] != kNone || at.log_p[K] != kNone;
        at.gradient[K] = 0;
        const std::int64_t count = bucket ? K + 1 : K;
        bool zeros = false;
        for (std::int64_t i = 0; i < count; ++i) zeros |= (at.log_q[i] == kNone) | (at.log_p[i] == kNone);
        out.D = zeros ? compare<true>(task, at, count) : compare<false>(task, at, count);
    } else {  // a side of -inf alone
        std::fill_n(at.gradient, K + 1, 0.0);
        if (std::isnan(out.teacher_entropy)) out.D = out.teacher_entropy;  // a NaN shows all the same; the student's does in CE
    }
    return out;
}

}  // namespace pocl
