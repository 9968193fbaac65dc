#include "divergence/outcomes.h"

#include <cmath>
#include <limits>

namespace pocl {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

/// a log(a/b) - a + b, the terms of KL(a||b): none is negative, and a + b sum to the same. `gap` is log(a/b), `difference` a - b.
double kl_term(double a, double gap, double difference) { return a > 0 ? a * gap - difference : -difference; }

/// An outcome's term of D, and u but for a constant that all outcomes share.
struct Term {
    double d, u;
};

Term term(Family family, double a, double p, double q, double gap, double difference, double e) {
    const double b = 1 - a;
    if (family == Family::forward_kl) return {kl_term(p, gap, difference), 0};
    if (family == Family::reverse_kl) return {kl_term(q, -gap, -difference), -gap};
    if (family == Family::tvd) return {0.5 * std::fabs(difference), gap < 0 ? 0.5 : gap > 0 ? -0.5 : gap};
    const double smaller_share = (gap > 0 ? b : a) * e;            // m over the larger of p and q, less 1
    const double log_m = std::log1p(smaller_share);                // log(m / the larger)
    const double log_p_m = (gap < 0 ? gap : 0) - log_m, log_q_m = (gap > 0 ? -gap : 0) - log_m;
    const double ratio = (gap > 0 ? -b : b) * e / (1 + smaller_share);  // p/m - 1
    const double of_p = kl_term(p, log_p_m, b * difference), of_q = kl_term(q, log_q_m, -a * difference);
    if (family == Family::jsd) return {a * of_p + b * of_q, b * log_q_m};
    if (family == Family::skew_forward_kl) return {of_p, -b * ratio};
    return {of_q, log_q_m + a * ratio};
}

}  // namespace

double log_sum_exp(const double* values, std::int64_t count) noexcept {
    double largest = kNone, sum = 0;
    bool any = false;
    for (std::int64_t i = 0; i < count; ++i) {
        any = any || values[i] != kNone;
        if (values[i] > largest) largest = values[i];
    }
    if (!any) return kNone;
    for (std::int64_t i = 0; i < count; ++i) sum += std::exp(values[i] - largest);
    return largest + std::log(sum);
}

double mean_under_softmax(const double* values, std::int64_t count, double log_z) noexcept {
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i)
        if (values[i] != kNone) sum += std::exp(values[i] - log_z) * values[i];
    return sum;
}

double log_rest_weight(const float* log_probs, std::int64_t K, std::int64_t V, double tau) noexcept {
    double listed = 0;
    std::int64_t others = V;
    for (std::int64_t j = 0; j < K; ++j) {
        if (log_probs[j] == -std::numeric_limits<float>::infinity()) continue;
        listed += std::exp(static_cast<double>(log_probs[j]));
        --others;
    }
    const double mass = 1 - listed;
    if (others <= 0 || mass <= 0) return kNone;
    const double log_n = std::log(static_cast<double>(others));
    return log_n + (std::log(mass) - log_n) / tau;
}

Comparison compare(Family family, double teacher_share, double* log_p, double* log_q, double* gradient, std::int64_t count) noexcept {
    for (std::int64_t i = 0; i < count; ++i)
        if (log_q[i] == kNone) log_p[i] = kNone;
    const double log_z_q = log_sum_exp(log_q, count), log_z_p = log_sum_exp(log_p, count);
    const bool nothing = log_z_q == kNone || log_z_p == kNone;
    Comparison sums;
    double u_mean = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        gradient[i] = 0;
        if (nothing || log_q[i] == kNone) {
            log_q[i] = 0;
            continue;
        }
        const double x = log_q[i] - log_z_q, y = log_p[i] - log_z_p, gap = y - x;
        const double larger = std::exp(gap > 0 ? y : x), e = std::expm1(-std::fabs(gap)), smaller = larger * (1 + e);
        const double p = gap > 0 ? larger : smaller, q = gap > 0 ? smaller : larger, difference = gap > 0 ? -larger * e : larger * e;
        const Term at = term(family, teacher_share, p, q, gap, difference, e);
        sums.D += at.d;
        if (p > 0) sums.teacher_entropy -= p * y;
        u_mean += q * at.u;
        gradient[i] = family == Family::forward_kl ? -difference : at.u;
        log_p[i] = y;
        log_q[i] = q;
    }
    for (std::int64_t i = 0; i < count && family != Family::forward_kl; ++i)
        gradient[i] = log_q[i] == 0 ? 0 : log_q[i] * (gradient[i] - u_mean);  // u may be infinite where q is 0
    if (sums.D < 0) sums.D = 0;
    return sums;
}

}  // namespace pocl
