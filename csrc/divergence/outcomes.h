// Two distributions over a few outcomes compared in double: what is left of D once the vocabulary has been summed up.
#pragma once
#include <cstdint>

#include "divergence/divergence.h"

namespace pocl {

/// log sum exp of `values`; -inf where all of them are.
double log_sum_exp(const double* values, std::int64_t count) noexcept;

/// sum exp(value - log_z) * value over the values that are not -inf.
double mean_under_softmax(const double* values, std::int64_t count, double log_z) noexcept;

/// log of the weight at temperature `tau` of all entries that are not listed, the mass that `log_probs` leave being spread evenly over
/// them: log(n (R/n)^(1/tau)); -inf where none is left.
double log_rest_weight(const float* log_probs, std::int64_t K, std::int64_t V, double tau) noexcept;

struct Comparison {
    double D = 0;
    double teacher_entropy = 0;
};

/// Compares p and q given as logarithms of weights, which become probabilities' (log_p) and probabilities (`q` for log_q) in place.
/// An outcome whose log_q is -inf is out of both; one whose log_p alone is has p = 0. `gradient` becomes q (u - mean of u), u = dD/dq,
/// the derivative by an outcome's logit times the temperature.
Comparison compare(Family family, double teacher_share, double* log_p, double* log_q, double* gradient, std::int64_t count) noexcept;

}  // namespace pocl
