#include "rouge/rouge.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "parallel/parallel.h"

namespace pocl {
namespace {

using Ids = std::span<const std::int32_t>;
constexpr std::int64_t kGrain = 64;  // pairs: below that, waking a thread costs more than it saves
constexpr std::uint64_t kAll = ~std::uint64_t{0};

/// Ones in the lowest `count` bits; `count` from 1 to 64.
std::uint64_t low_bits(std::size_t count) { return kAll >> (64 - count); }

/// Longest common subsequences, with memory that is kept from pair to pair.
class Lcs {
public:
    explicit Lcs(std::int32_t num_ids) : mask_of_(static_cast<std::size_t>(num_ids), -1) {}

    std::int64_t length(Ids pattern, Ids text) {
        if (pattern.size() > text.size()) std::swap(pattern, text);  // the shorter one: fewer machine words a step
        if (pattern.empty()) return 0;
        const std::size_t words = (pattern.size() + 63) / 64;
        set_masks(pattern, words);
        const std::int64_t length = words == 1 ? one_word(pattern.size(), text) : many_words(pattern.size(), text, words);
        for (const std::int32_t id : pattern) mask_of_[static_cast<std::size_t>(id)] = -1;
        return length;
    }

private:
    /// masks_[mask_of_[id] + w] has a bit set for each place of the id in word w of the pattern.
    void set_masks(Ids pattern, std::size_t words) {
        masks_.clear();
        for (std::size_t i = 0; i < pattern.size(); ++i) {
            std::int64_t& mask = mask_of_[static_cast<std::size_t>(pattern[i])];
            if (mask < 0) {
                mask = static_cast<std::int64_t>(masks_.size());
                masks_.resize(masks_.size() + words, 0);
            }
            masks_[static_cast<std::size_t>(mask) + i / 64] |= std::uint64_t{1} << (i % 64);
        }
    }

    // A zero bit in the row is a place of the pattern where the length of the subsequence grows by one.
    std::int64_t one_word(std::size_t size, Ids text) const {
        std::uint64_t row = kAll;
        for (const std::int32_t id : text) {
            const std::int64_t mask = mask_of_[static_cast<std::size_t>(id)];
            if (mask < 0) continue;
            const std::uint64_t match = row & masks_[static_cast<std::size_t>(mask)];
            row = (row + match) | (row - match);
        }
        return std::popcount(~row & low_bits(size));
    }

    std::int64_t many_words(std::size_t size, Ids text, std::size_t words) {
        row_.assign(words, kAll);
        for (const std::int32_t id : text) {
            const std::int64_t mask = mask_of_[static_cast<std::size_t>(id)];
            if (mask < 0) continue;
            std::uint64_t carry = 0;
            for (std::size_t w = 0; w < words; ++w) {
                const std::uint64_t match = row_[w] & masks_[static_cast<std::size_t>(mask) + w];
                const std::uint64_t with_carry = row_[w] + carry;
                const std::uint64_t sum = with_carry + match;
                carry = static_cast<std::uint64_t>(with_carry < carry) | static_cast<std::uint64_t>(sum < match);
                row_[w] = sum | (row_[w] & ~match);
            }
        }
        std::int64_t length = std::popcount(~row_.back() & low_bits(size - 64 * (words - 1)));
        for (std::size_t w = 0; w + 1 < words; ++w) length += std::popcount(~row_[w]);
        return length;
    }

    std::vector<std::int64_t> mask_of_;  // id -> where its mask begins, or -1
    std::vector<std::uint64_t> masks_, row_;
};

struct Score {
    double precision = 0, recall = 0, fmeasure = 0;
};

/// The operations of rouge-score in its order, so that the bits are the same.
Score score(Lcs& lcs, Ids prediction, Ids reference) {
    if (prediction.empty() || reference.empty()) return {};
    const auto common = static_cast<double>(lcs.length(prediction, reference));
    const double precision = common / static_cast<double>(prediction.size());
    const double recall = common / static_cast<double>(reference.size());
    return {precision, recall, precision + recall > 0 ? 2 * precision * recall / (precision + recall) : 0};
}

}  // namespace

void rouge_l(const Tokens& tokens, std::int32_t num_ids, std::span<const std::int64_t> first_reference, const RougeL& scores,
             int threads) {
    const auto count = static_cast<std::int64_t>(scores.fmeasure.size());
    const auto text = [&](std::int64_t i) {
        const auto at = static_cast<std::size_t>(i);
        return Ids(tokens.ids).subspan(static_cast<std::size_t>(tokens.offsets[at]),
                                       static_cast<std::size_t>(tokens.offsets[at + 1] - tokens.offsets[at]));
    };
    // eight pieces a thread even out pairs of unequal length; each piece pays for a table of all ids, so not more
    const std::int64_t grain = std::max(kGrain, count / (8 * std::int64_t{std::max(threads, 1)}) + 1);
    parallel_for(count, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        Lcs lcs(num_ids);
        for (std::int64_t i = begin; i < end; ++i) {
            const auto at = static_cast<std::size_t>(i);
            Score best = score(lcs, text(i), text(count + first_reference[at]));
            for (std::int64_t r = first_reference[at] + 1; r < first_reference[at + 1]; ++r) {
                const Score other = score(lcs, text(i), text(count + r));
                if (other.fmeasure > best.fmeasure) best = other;
            }
            scores.precision[at] = best.precision;
            scores.recall[at] = best.recall;
            scores.fmeasure[at] = best.fmeasure;
        }
    });
}

}  // namespace pocl
