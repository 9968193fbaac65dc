#include "ranking/rank.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel/parallel.h"

namespace pocl {
namespace {

constexpr int kMaxDigitBits = 11;  // 2048 counters a chunk fit the first-level cache
constexpr std::size_t kMaxDigits = std::size_t{1} << kMaxDigitBits;
constexpr int kRadixBits = 3 * kMaxDigitBits;  // scores that agree in more leading bits are so few that comparing is cheaper
constexpr std::size_t kShortRun = 16;  // items: insertion is quicker up to there
constexpr std::int64_t kGrain = 1 << 15;  // samples: below that, waking a thread costs more than it saves

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

/// Keys and the samples they are of, in the order reached so far.
struct Items {
    std::span<std::uint64_t> key;
    std::span<std::uint32_t> index;
};

/// Sorts arrays of one length, in memory that is used for one after the other.
class Sorter {
public:
    Sorter(const Items& items, const Items& other, int threads)
        : n_(static_cast<std::int64_t>(items.key.size())),
          threads_(threads),
          chunks_(std::clamp<std::int64_t>(n_ / kGrain, 1, std::max(threads, 1))),
          items_(items),
          other_(other),
          counts_(static_cast<std::size_t>(chunks_)) {}

    /// Calls visit(position, sample) for each position of the sorted array, from many threads; the keys are not needed by then.
    template <class T, class Visit>
    void operator()(std::span<const T> scores, Order order, const Visit& visit) {
        if (!sort(scores, order)) return each([&](std::size_t i) { visit(i, i); });
        each([&](std::size_t i) { visit(i, items_.index[i]); });
    }

    /// Calls visit(rank, sample) for each sample, from many threads; those of equal scores have the mean of their ranks, which the
    /// keys are needed for.
    template <class T, class Visit>
    void mean_ranks(std::span<const T> scores, Order order, const Visit& visit) {
        const double of_all = mean_rank(0, static_cast<std::size_t>(n_));
        if (!sort(scores, order)) return each([&](std::size_t i) { visit(of_all, i); });
        each_chunk([&](std::size_t, std::size_t begin, std::size_t end) {
            for (std::size_t first = begin, last; first < end; first = last) {
                for (last = first + 1; last < end && items_.key[last] == items_.key[first];) ++last;
                const double rank = mean_rank(first == begin ? run_begin(first) : first, last == end ? run_end(last - 1) : last);
                for (std::size_t i = first; i < last; ++i) visit(rank, items_.index[i]);
            }
        });
    }

private:
    /// Brings items_ into the order of the scores. False where all are equal: then items_ is as it was.
    template <class T>
    bool sort(std::span<const T> scores, Order order) {
        const std::uint64_t differing = n_ == 0 ? 0 : differing_bits(scores, order);
        if (differing == 0) return false;
        // only bits that differ somewhere are sorted by, in as few and as equal digits as they need
        const int lowest = std::countr_zero(differing), high = 64 - std::countl_zero(differing);
        const int low = std::max(lowest, high - kRadixBits);
        const int passes = (high - low + kMaxDigitBits - 1) / kMaxDigitBits;
        const int bits = (high - low + passes - 1) / passes;
        sort_by_digit(low, bits, [&](std::size_t i) { return sort_key(scores[i], order); }, [](std::size_t i) { return i; });
        const auto key = [&](std::size_t i) { return items_.key[i]; };
        const auto index = [&](std::size_t i) { return items_.index[i]; };
        for (int pass = 1; pass < passes; ++pass) sort_by_digit(low + pass * bits, bits, key, index);
        if (low > lowest) sort_runs(low);
        return true;
    }

    /// The mean of the ranks of the positions [begin, end).
    static double mean_rank(std::size_t begin, std::size_t end) { return 0.5 * static_cast<double>(begin + 1 + end); }

    /// The bounds of the sorted items whose key is that of position i.
    std::size_t run_begin(std::size_t i) const {
        const auto& key = items_.key;
        return static_cast<std::size_t>(std::lower_bound(key.begin(), key.begin() + static_cast<std::ptrdiff_t>(i), key[i]) - key.begin());
    }
    std::size_t run_end(std::size_t i) const {
        const auto& key = items_.key;
        return static_cast<std::size_t>(std::upper_bound(key.begin() + static_cast<std::ptrdiff_t>(i), key.end(), key[i]) - key.begin());
    }

    std::size_t start_of(std::int64_t chunk) const { return static_cast<std::size_t>(n_ * chunk / chunks_); }

    /// Calls body(chunk, begin, end) for each chunk of [0, n).
    template <class Body>
    void each_chunk(const Body& body) const {
        parallel_for(chunks_, 1, threads_, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t chunk = first; chunk < last; ++chunk)
                body(static_cast<std::size_t>(chunk), start_of(chunk), start_of(chunk + 1));
        });
    }

    template <class Body>
    void each(const Body& body) const {
        each_chunk([&](std::size_t, std::size_t begin, std::size_t end) {
            for (std::size_t i = begin; i < end; ++i) body(i);
        });
    }

    /// The bits in which not all keys agree.
    template <class T>
    std::uint64_t differing_bits(std::span<const T> scores, Order order) const {
        const std::uint64_t first_key = sort_key(scores[0], order);
        std::vector<std::uint64_t> of_chunk(static_cast<std::size_t>(chunks_));
        each_chunk([&](std::size_t chunk, std::size_t begin, std::size_t end) {
            std::uint64_t bits = 0;
            for (std::size_t i = begin; i < end; ++i) bits |= sort_key(scores[i], order) ^ first_key;
            of_chunk[chunk] = bits;
        });
        std::uint64_t all = 0;
        for (const std::uint64_t bits : of_chunk) all |= bits;
        return all;
    }

    /// One stable counting pass from key(i), index(i) to items_: a chunk's items of a digit follow those of the chunks before it.
    template <class Key, class Index>
    void sort_by_digit(int shift, int bits, const Key& key, const Index& index) {
        const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
        each_chunk([&](std::size_t chunk, std::size_t begin, std::size_t end) {
            auto& count = counts_[chunk];
            count.fill(0);
            for (std::size_t i = begin; i < end; ++i) ++count[(key(i) >> shift) & mask];
        });
        std::size_t place = 0;
        for (std::size_t digit = 0; digit <= mask; ++digit)
            for (auto& count : counts_) place += std::exchange(count[digit], place);
        each_chunk([&](std::size_t chunk, std::size_t begin, std::size_t end) {
            auto& next = counts_[chunk];
            for (std::size_t i = begin; i < end; ++i) {
                const std::uint64_t k = key(i);
                const std::size_t to = next[(k >> shift) & mask]++;
                other_.key[to] = k;
                other_.index[to] = static_cast<std::uint32_t>(index(i));
            }
        });
        std::swap(items_, other_);
    }

    /// Sorts, stably, each run of items that agree in the bits from `shift` upwards.
    void sort_runs(int shift) const {
        const auto& key = items_.key;
        const auto end_of = [&](std::size_t begin) {
            std::size_t end = begin + 1;
            while (end < key.size() && key[end] >> shift == key[begin] >> shift) ++end;
            return end;
        };
        // a run belongs to the chunk in which it begins; found before any item moves
        std::vector<std::size_t> starts;
        for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
            const std::size_t at = start_of(chunk);
            starts.push_back(at == 0 ? 0 : std::max(starts.back(), end_of(at - 1)));
        }
        starts.push_back(key.size());
        each_chunk([&](std::size_t chunk, std::size_t, std::size_t) {
            for (std::size_t begin = starts[chunk], end; begin < starts[chunk + 1]; begin = end) {
                end = end_of(begin);
                if (end - begin > 1) sort_run(begin, end);
            }
        });
    }

    void sort_run(std::size_t begin, std::size_t end) const {
        const auto key = items_.key.subspan(begin, end - begin);
        const auto index = items_.index.subspan(begin, end - begin);
        if (std::is_sorted(key.begin(), key.end())) return;  // ties, most often
        if (key.size() > kShortRun) return sort_long_run(begin, end);
        for (std::size_t i = 1; i < key.size(); ++i)
            for (std::size_t j = i; j > 0 && key[j - 1] > key[j]; --j) {
                std::swap(key[j - 1], key[j]);
                std::swap(index[j - 1], index[j]);
            }
    }

    /// Merge sort from items_ to the same places of other_ and back: no memory of its own.
    void sort_long_run(std::size_t begin, std::size_t end) const {
        const std::size_t size = end - begin;
        Items from{items_.key.subspan(begin, size), items_.index.subspan(begin, size)};
        Items to{other_.key.subspan(begin, size), other_.index.subspan(begin, size)};
        for (std::size_t width = 1; width < size; width *= 2) {
            for (std::size_t left = 0; left < size; left += 2 * width)
                merge(from, to, left, std::min(left + width, size), std::min(left + 2 * width, size));
            std::swap(from, to);
        }
        if (from.key.data() == items_.key.data() + begin) return;
        std::ranges::copy(from.key, to.key.begin());
        std::ranges::copy(from.index, to.index.begin());
    }

    static void merge(const Items& from, const Items& to, std::size_t left, std::size_t middle, std::size_t end) {
        for (std::size_t a = left, b = middle, out = left; out < end; ++out) {
            const std::size_t take = b == end || (a < middle && from.key[a] <= from.key[b]) ? a++ : b++;
            to.key[out] = from.key[take];
            to.index[out] = from.index[take];
        }
    }

    std::int64_t n_;
    int threads_;
    std::int64_t chunks_;
    Items items_, other_;
    std::vector<std::array<std::size_t, kMaxDigits>> counts_;
};

/// The memory of signed numbers as unsigned ones.
std::span<std::uint64_t> as_keys(std::span<std::int64_t> numbers) {
    return {reinterpret_cast<std::uint64_t*>(numbers.data()), numbers.size()};
}

}  // namespace

void fuse(std::span<const Ranking> rankings, double k, Ties ties, const Fusion& fusion, std::span<std::uint32_t> scratch,
          int threads) {
    const std::size_t n = fusion.score.size();
    Sorter sorter({as_keys(fusion.rank), scratch.first(n)}, {as_keys(fusion.order), scratch.last(n)}, threads);
    std::fill(fusion.score.begin(), fusion.score.end(), 0.0);
    for (const Ranking& ranking : rankings) {
        const auto add = [&](double rank, std::size_t sample) { fusion.score[sample] += ranking.weight / (k + rank); };
        const auto add_at = [&](std::size_t place, std::size_t sample) { add(static_cast<double>(place + 1), sample); };
        std::visit(
            [&](const auto& scores) {
                if (ties == Ties::average)
                    sorter.mean_ranks(scores, ranking.order, add);
                else
                    sorter(scores, ranking.order, add_at);
            },
            ranking.scores);
    }
    sorter(std::span<const double>(fusion.score), Order::descending, [&](std::size_t place, std::size_t sample) {
        fusion.order[place] = static_cast<std::int64_t>(sample);
        fusion.rank[sample] = static_cast<std::int64_t>(place + 1);
    });
}

}  // namespace pocl
