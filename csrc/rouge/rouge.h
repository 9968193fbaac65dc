// ROUGE-L over word ids. No Python, no torch.
#pragma once
#include <cstdint>
#include <span>

#include "rouge/words.h"

namespace pocl {

/// Scores from 0 to 1, one of each a prediction.
struct RougeL {
    std::span<double> precision, recall, fmeasure;
};

/// ROUGE-L of predictions against references. The first texts of `tokens` are the predictions, as many as `scores` has places;
/// the references stand behind them, and prediction i has those from first_reference[i] to first_reference[i + 1]. The one with
/// the largest F counts, the first one at ties. Ids are below `num_ids`. Bit-parallel longest common subsequence (Crochemore et
/// al. 2001, Hyyrö 2004): O(prediction · reference / 64) a pair.
void rouge_l(const Tokens& tokens, std::int32_t num_ids, std::span<const std::int64_t> first_reference, const RougeL& scores,
             int threads);

}  // namespace pocl
