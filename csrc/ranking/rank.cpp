#include "ranking/rank.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel/parallel.h"

namespace pocl {
namespace {

constexpr int kMaxDigitBits = 11;  // 2048 counters a chunk fit the first-level cache
constexpr std::size_t kMaxDigits = std::size_t{1} << kMaxDigitBits;
constexpr int kRadixBits = 3 * kMaxDigitBits;  // scores that agree in more leading bits are so few that comparing is cheaper
constexpr std::int64_t kGrain = 1 << 15;  // samples: below that, waking a thread costs more than it saves

struct Item {
    std::uint64_t key;
    std::int64_t index;
};

/// Unsigned integers that sort like the scores, best first: the sign folded in, -0 as 0, NaN last in either direction.
template <class T>
std::uint64_t sort_key(T score, Order order) {
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    if (std::isnan(score)) return std::numeric_limits<Bits>::max();
    constexpr Bits sign = Bits{1} << (8 * sizeof(T) - 1);
    const Bits bits = std::bit_cast<Bits>(score == T{0} ? T{0} : score);
    const Bits ascending = bits & sign ? static_cast<Bits>(~bits) : bits | sign;
    return order == Order::ascending ? ascending : static_cast<Bits>(~ascending);
}

/// Sorts arrays of one length, with memory that is kept from array to array.
class Sorter {
public:
    Sorter(std::int64_t n, int threads)
        : n_(n),
          threads_(threads),
          chunks_(std::clamp<std::int64_t>(n / kGrain, 1, std::max(threads, 1))),
          items_(std::make_unique_for_overwrite<Item[]>(static_cast<std::size_t>(n))),  // untouched: the threads fault it in
          other_(std::make_unique_for_overwrite<Item[]>(static_cast<std::size_t>(n))),
          counts_(static_cast<std::size_t>(chunks_)) {}

    /// Calls visit(position, sample) for each position of the sorted array, from many threads.
    template <class T, class Visit>
    void operator()(std::span<const T> scores, Order order, const Visit& visit) {
        if (n_ == 0) return;
        const std::uint64_t differing = load(scores, order);
        // only bits that differ somewhere are sorted by, in as few and as equal digits as they need
        const int lowest = differing ? std::countr_zero(differing) : 0, high = 64 - std::countl_zero(differing);
        const int low = std::max(lowest, high - kRadixBits);
        const int passes = (high - low + kMaxDigitBits - 1) / kMaxDigitBits;
        const int digit_bits = passes ? (high - low + passes - 1) / passes : 0;
        for (int pass = 0; pass < passes; ++pass) sort_by_digit(low + pass * digit_bits, digit_bits);
        if (low > lowest) sort_runs(low);
        each_chunk([&](std::size_t, std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) visit(i, items_[static_cast<std::size_t>(i)].index);
        });
    }

    /// Calls body(chunk, begin, end) for each chunk of [0, n).
    template <class Body>
    void each_chunk(const Body& body) const {
        parallel_for(chunks_, 1, threads_, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t chunk = first; chunk < last; ++chunk)
                body(static_cast<std::size_t>(chunk), n_ * chunk / chunks_, n_ * (chunk + 1) / chunks_);
        });
    }

private:
    /// Keys and indices of the scores. Returns the bits in which not all keys agree.
    template <class T>
    std::uint64_t load(std::span<const T> scores, Order order) {
        const std::uint64_t first_key = sort_key(scores[0], order);
        std::vector<std::uint64_t> differing(static_cast<std::size_t>(chunks_));
        each_chunk([&](std::size_t chunk, std::int64_t begin, std::int64_t end) {
            std::uint64_t bits = 0;
            for (std::int64_t i = begin; i < end; ++i) {
                const auto at = static_cast<std::size_t>(i);
                items_[at] = {sort_key(scores[at], order), i};
                bits |= items_[at].key ^ first_key;
            }
            differing[chunk] = bits;
        });
        std::uint64_t all = 0;
        for (const std::uint64_t bits : differing) all |= bits;
        return all;
    }

    /// One stable counting pass: a chunk's items of a digit follow those of the chunks before it.
    void sort_by_digit(int shift, int bits) {
        const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
        each_chunk([&](std::size_t chunk, std::int64_t begin, std::int64_t end) {
            auto& count = counts_[chunk];
            count.fill(0);
            for (std::int64_t i = begin; i < end; ++i) ++count[(items_[static_cast<std::size_t>(i)].key >> shift) & mask];
        });
        std::int64_t place = 0;
        for (std::size_t digit = 0; digit <= mask; ++digit)
            for (auto& count : counts_) place += std::exchange(count[digit], place);
        each_chunk([&](std::size_t chunk, std::int64_t begin, std::int64_t end) {
            auto& next = counts_[chunk];
            for (std::int64_t i = begin; i < end; ++i) {
                const Item item = items_[static_cast<std::size_t>(i)];
                other_[static_cast<std::size_t>(next[(item.key >> shift) & mask]++)] = item;
            }
        });
        items_.swap(other_);
    }

    /// Sorts, stably, each run of items that agree in the bits from `shift` upwards.
    void sort_runs(int shift) {
        const std::span<Item> items(items_.get(), static_cast<std::size_t>(n_));
        const auto run_end = [&](std::size_t begin) {
            std::size_t end = begin + 1;
            while (end < items.size() && items[end].key >> shift == items[begin].key >> shift) ++end;
            return end;
        };
        // a run belongs to the chunk in which it begins; found before any item moves
        std::vector<std::size_t> starts;
        for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
            const auto at = static_cast<std::size_t>(n_ * chunk / chunks_);
            starts.push_back(at == 0 ? 0 : std::max(starts.back(), run_end(at - 1)));
        }
        starts.push_back(items.size());
        each_chunk([&](std::size_t chunk, std::int64_t, std::int64_t) {
            for (std::size_t begin = starts[chunk], end; begin < starts[chunk + 1]; begin = end) {
                end = run_end(begin);
                if (end - begin > 1) sort_run(items.subspan(begin, end - begin));
            }
        });
    }

    static void sort_run(std::span<Item> run) {
        const auto by_key = [](const Item& a, const Item& b) { return a.key < b.key; };
        if (std::is_sorted(run.begin(), run.end(), by_key)) return;  // ties, most often
        if (run.size() > 16) return std::stable_sort(run.begin(), run.end(), by_key);
        for (std::size_t i = 1; i < run.size(); ++i)  // std::stable_sort allocates, which a short run does not pay back
            std::rotate(std::upper_bound(run.begin(), run.begin() + static_cast<std::ptrdiff_t>(i), run[i], by_key),
                        run.begin() + static_cast<std::ptrdiff_t>(i), run.begin() + static_cast<std::ptrdiff_t>(i + 1));
    }

    std::int64_t n_;
    int threads_;
    std::int64_t chunks_;
    std::unique_ptr<Item[]> items_, other_;
    std::vector<std::array<std::int64_t, kMaxDigits>> counts_;
};

}  // namespace

void fuse(std::span<const Ranking> rankings, double k, const Fusion& fusion, int threads) {
    Sorter sorter(static_cast<std::int64_t>(fusion.score.size()), threads);
    std::fill(fusion.score.begin(), fusion.score.end(), 0.0);
    for (const Ranking& ranking : rankings) {
        const auto add = [&](std::int64_t place, std::int64_t sample) {
            fusion.score[static_cast<std::size_t>(sample)] += ranking.weight / (k + static_cast<double>(place + 1));
        };
        std::visit([&](const auto& scores) { sorter(scores, ranking.order, add); }, ranking.scores);
    }
    sorter(std::span<const double>(fusion.score), Order::descending, [&](std::int64_t place, std::int64_t sample) {
        fusion.order[static_cast<std::size_t>(place)] = sample;
        fusion.rank[static_cast<std::size_t>(sample)] = place + 1;
    });
}

}  // namespace pocl
