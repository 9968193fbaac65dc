// What lies between the two sweeps of a sparse row: the outcomes of D, which are the listed entries and the rest, compared in double.
#pragma once
#include "sparse/sparse.h"

namespace pocl {

/// Memory of one thread.
struct SparseScratch {
    double* s;               // [K + 1] logits of the listed entries, -inf where one is absent
    double* ce;              // [K + 1] their probabilities at temperature 1
    double* log_q;           // [K + 1] of the outcomes, the last of them the rest; so on to `gradient`
    double* q;
    double* log_p;
    double* p;
    double* gradient;        // tau dD/ds; the rest's is the sum over its entries
    std::int32_t* by_block;  // [K] the present entries, those of the first block first
    std::int32_t* ends;      // [blocks + 1] where each block's end in `by_block`
    float* kept;             // the rest's exponentials at temperature tau, a place each as Pieces gives it
    float* kept_ce;          // and at temperature 1, where they are not those or their squares
    float* kept_max;         // [blocks] the maxima that those of a block are relative to
};

/// The student's entries that are not listed. Without any, or where all are -inf, z is 0.
struct RestSums {
    double max = 0;                   // their largest logit
    double z = 0, x_sum = 0;          // sums of 2^x and 2^x x for x = (logit - max) log2(e) / tau
    double z_ce = 0;                  // sum of 2^x at temperature 1
};

struct RowSums {
    double D = 0, student_entropy = 0, teacher_entropy = 0;
    double log_z_ce = 0;              // of the student's whole vocabulary at temperature 1; -inf: no softmax
    double log_rest = 0;              // log of the rest's sum of exponentials at temperature tau
    double rest_ce = 0;               // the rest's probability at temperature 1
    float largest = 0;                // logit of the student
    bool agree = false;
};

/// From scratch.s and the rest: everything a row's stats need, scratch.ce and scratch.gradient.
RowSums compare_outcomes(const SparseTask& task, std::int64_t n, const RestSums& rest, const SparseScratch& scratch) noexcept;

}  // namespace pocl
