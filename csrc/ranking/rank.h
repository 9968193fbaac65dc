// Ranks of scores and their reciprocal rank fusion. No Python, no torch.
#pragma once
#include <cstdint>
#include <span>
#include <variant>

namespace pocl {

enum class Order { ascending, descending };  // descending: the highest score is the best

/// The ranks of equal scores, in each ranking: all the mean of their places, or each its own, the earlier sample first.
enum class Ties { average, first };

/// One array of scores, which of its ends is the best, and what its ranks weigh in the fusion.
struct Ranking {
    std::variant<std::span<const float>, std::span<const double>> scores;
    Order order;
    double weight;
};

/// What comes out of a fusion; each span has the size of every ranking's scores.
struct Fusion {
    std::span<double> score;        // by sample
    std::span<std::int64_t> rank;   // by sample, from 1
    std::span<std::int64_t> order;  // samples, best first
};

constexpr std::int64_t kMostSamples = std::int64_t{1} << 32;  // an index takes 4 bytes while it is sorted

/// score[i] = Σ weight / (k + rank of i), summed in the order of `rankings`; the highest score is the best. Ranks count from 1,
/// -0 equals 0, NaN comes last and is equal to NaN. Equal fused scores go by index. Stable radix sort, linear in samples and
/// rankings but where many scores differ only in their last bits; the same bits on any number of threads. `scratch` has two places
/// a sample, so that with the results, in whose memory it sorts, a fusion takes 32 bytes a sample; of at most `kMostSamples` samples.
void fuse(std::span<const Ranking> rankings, double k, Ties ties, const Fusion& fusion, std::span<std::uint32_t> scratch,
          int threads);

}  // namespace pocl
