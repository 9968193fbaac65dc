#include "rouge/rouge.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>
#include <vector>

#include "parallel/parallel.h"

namespace pocl {
namespace {

using Ids = std::span<const std::int32_t>;
constexpr std::int64_t kGrain = 64;  // pairs: below that, waking a thread costs more than it saves
constexpr std::size_t kStrip = 8;  // machine words: the row of a strip fits the registers
constexpr std::uint64_t kAll = ~std::uint64_t{0};

/// Longest common subsequences, with memory that is kept from pair to pair.
class Lcs {
public:
    explicit Lcs(std::int32_t num_ids) : mask_of_(static_cast<std::size_t>(num_ids), -1) {}

    std::int64_t length(Ids pattern, Ids text) {
        if (pattern.size() > text.size()) std::swap(pattern, text);  // the shorter one: fewer machine words a step
        if (pattern.empty()) return 0;
        const std::size_t words = (pattern.size() + 63) / 64;
        set_masks(pattern, words);
        const std::int64_t length = words == 1 ? one_word(text) : many_words(text, words);
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

    // A zero bit in the row is a place of the pattern where the length of the subsequence grows by one; bits beyond the pattern
    // match nothing and stay ones.
    std::int64_t one_word(Ids text) const {
        std::uint64_t row = kAll;
        for (const std::int32_t id : text) {
            const std::int64_t mask = mask_of_[static_cast<std::size_t>(id)];
            if (mask < 0) continue;
            const std::uint64_t match = row & masks_[static_cast<std::size_t>(mask)];
            row = (row + match) | (row - match);
        }
        return std::popcount(~row);
    }

    /// Strip by strip of the pattern, each over the whole text, so that its row stays in registers; carries_ has what each id of
    /// the text carries out of the strip before.
    std::int64_t many_words(Ids text, std::size_t words) {
        places_.clear();
        for (const std::int32_t id : text)
            if (const std::int64_t mask = mask_of_[static_cast<std::size_t>(id)]; mask >= 0) places_.push_back(mask);
        carries_.assign(places_.size(), 0);
        std::int64_t zeros = 0;
        std::size_t w = 0;
        for (; w + kStrip <= words; w += kStrip) zeros += strip<kStrip>(w);
        for (; w < words; ++w) zeros += strip<1>(w);
        return zeros;
    }

    template <std::size_t Words>
    std::int64_t strip(std::size_t first) {
        std::array<std::uint64_t, Words> row;
        row.fill(kAll);
        for (std::size_t i = 0; i < places_.size(); ++i) {
            const std::uint64_t* const mask = masks_.data() + places_[i] + first;
            std::uint64_t carry = carries_[i];
            for (std::size_t w = 0; w < Words; ++w) {
                const std::uint64_t match = row[w] & mask[w];
                const std::uint64_t with_carry = row[w] + carry;
                const std::uint64_t sum = with_carry + match;
                carry = static_cast<std::uint64_t>(with_carry < carry) | static_cast<std::uint64_t>(sum < match);
                row[w] = sum | (row[w] & ~match);
            }
            carries_[i] = static_cast<std::uint8_t>(carry);
        }
        std::int64_t zeros = 0;
        for (const std::uint64_t word : row) zeros += std::popcount(~word);
        return zeros;
    }

    std::vector<std::int64_t> mask_of_;  // id -> where its mask begins, or -1
    std::vector<std::uint64_t> masks_;
    std::vector<std::int64_t> places_;    // in masks_, of the text's ids that are in the pattern
    std::vector<std::uint8_t> carries_;
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
