#include "rouge/words.h"

#include <algorithm>
#include <array>
#include <functional>
#include <string_view>
#include <utility>

#include "parallel/parallel.h"

namespace pocl {
namespace {

constexpr std::int64_t kGrain = 256;  // texts: below that, a vocabulary of its own costs a thread more than it saves

/// Lower case of an ASCII letter or digit; 0 for what separates words.
constexpr std::array<char, 128> kLower = [] {
    std::array<char, 128> table{};
    for (char c = '0'; c <= '9'; ++c) table[static_cast<std::size_t>(c)] = c;
    for (char c = 'a'; c <= 'z'; ++c) table[static_cast<std::size_t>(c)] = table[static_cast<std::size_t>(c - 'a' + 'A')] = c;
    return table;
}();

/// Numbers distinct words in the order of their first appearance: open addressing, never more than half full.
class Vocabulary {
public:
    std::int32_t id_of(std::string_view word) {
        const std::size_t hash = std::hash<std::string_view>{}(word);
        for (std::size_t slot = place_of(hash);; slot = (slot + 1) & (slots_.size() - 1)) {
            const std::int32_t id = slots_[slot];
            if (id < 0) return add(word, hash, slot);
            if (hashes_[static_cast<std::size_t>(id)] == hash && words_[static_cast<std::size_t>(id)] == word) return id;
        }
    }

    std::vector<std::string>& words() { return words_; }

private:
    std::size_t place_of(std::size_t hash) const { return hash & (slots_.size() - 1); }

    std::int32_t add(std::string_view word, std::size_t hash, std::size_t slot) {
        const auto id = static_cast<std::int32_t>(words_.size());
        words_.emplace_back(word);
        hashes_.push_back(hash);
        slots_[slot] = id;
        if (2 * words_.size() > slots_.size()) grow();
        return id;
    }

    void grow() {
        slots_.assign(2 * slots_.size(), -1);
        for (std::size_t id = 0; id < words_.size(); ++id) {
            std::size_t slot = place_of(hashes_[id]);
            while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
            slots_[slot] = static_cast<std::int32_t>(id);
        }
    }

    std::vector<std::int32_t> slots_ = std::vector<std::int32_t>(1 << 10, -1);  // ids, -1 where free
    std::vector<std::string> words_;
    std::vector<std::size_t> hashes_;
};

/// Some consecutive texts with a vocabulary of their own, so that threads share nothing.
class Chunk {
public:
    void read(const CodePoints& text) {
        if (text.width == 1) scan(static_cast<const std::uint8_t*>(text.data), text.size);
        else if (text.width == 2) scan(static_cast<const std::uint16_t*>(text.data), text.size);
        else scan(static_cast<const std::uint32_t*>(text.data), text.size);
        ends.push_back(static_cast<std::int64_t>(ids.size()));
    }

    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> ends;  // of each text in ids
    Vocabulary vocabulary;

private:
    template <class Char>
    void scan(const Char* text, std::int64_t size) {
        lowered_.resize(std::max(lowered_.size(), 2 * static_cast<std::size_t>(size)));
        const char* const end = lower(text, size, lowered_.data());
        for (const char* at = lowered_.data(); at != end;) {
            const char* const word = std::find_if(at, end, [](char c) { return c != '\0'; });
            at = std::find(word, end, '\0');
            if (word != at) ids.push_back(vocabulary.id_of({word, static_cast<std::size_t>(at - word)}));
        }
    }

    /// Letters and digits in lower case, zero for all else; at most two characters for one. Returns the end of `out`.
    template <class Char>
    static char* lower(const Char* text, std::int64_t size, char* out) {
        for (std::int64_t i = 0; i < size; ++i) {
            const std::uint32_t c = text[i];
            *out++ = c < 128 ? kLower[c] : '\0';
            if constexpr (sizeof(Char) > 1) {
                if (c == 0x212A) out[-1] = 'k';  // the Kelvin sign is a k in lower case
                else if (c == 0x0130) out[-1] = 'i', *out++ = '\0';  // the dotted capital I is an i and a combining dot
            }
        }
        return out;
    }

    std::vector<char> lowered_;  // kept from text to text
};

/// The chunks behind each other over one vocabulary.
Tokens merged(std::vector<Chunk>& chunks, int threads) {
    Vocabulary vocabulary;
    Tokens tokens;
    tokens.offsets.push_back(0);
    std::vector<std::vector<std::int32_t>> renamed(chunks.size());
    std::vector<std::int64_t> starts;
    for (std::size_t c = 0; c < chunks.size(); ++c) {
        for (const std::string& word : chunks[c].vocabulary.words()) renamed[c].push_back(vocabulary.id_of(word));
        starts.push_back(tokens.offsets.back());
        for (const std::int64_t end : chunks[c].ends) tokens.offsets.push_back(starts.back() + end);
    }
    tokens.ids.resize(static_cast<std::size_t>(tokens.offsets.back()));
    parallel_for(static_cast<std::int64_t>(chunks.size()), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (auto c = static_cast<std::size_t>(begin); c < static_cast<std::size_t>(end); ++c)
            std::transform(chunks[c].ids.begin(), chunks[c].ids.end(), tokens.ids.begin() + starts[c],
                           [&](std::int32_t id) { return renamed[c][static_cast<std::size_t>(id)]; });
    });
    tokens.words = std::move(vocabulary.words());
    return tokens;
}

}  // namespace

Tokens tokenize(std::span<const CodePoints> texts, int threads) {
    const auto n = static_cast<std::int64_t>(texts.size());
    // one a thread: more would even out texts of unequal length, but learn and merge the same words once more each
    const std::int64_t count = std::clamp<std::int64_t>(n / kGrain, 1, std::max(threads, 1));
    std::vector<Chunk> chunks(static_cast<std::size_t>(count));
    parallel_for(count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t chunk = begin; chunk < end; ++chunk)
            for (std::int64_t i = n * chunk / count; i < n * (chunk + 1) / count; ++i)
                chunks[static_cast<std::size_t>(chunk)].read(texts[static_cast<std::size_t>(i)]);
    });
    return merged(chunks, threads);
}

Tokens with_forms(const Tokens& tokens, std::span<const std::int32_t> forms) {
    Tokens out;
    out.ids.reserve(tokens.ids.size());
    out.offsets.reserve(tokens.offsets.size());
    out.offsets.push_back(0);
    for (std::size_t text = 0; text + 1 < tokens.offsets.size(); ++text) {
        for (auto i = static_cast<std::size_t>(tokens.offsets[text]); i < static_cast<std::size_t>(tokens.offsets[text + 1]); ++i) {
            const std::int32_t form = forms[static_cast<std::size_t>(tokens.ids[i])];
            if (form >= 0) out.ids.push_back(form);
        }
        out.offsets.push_back(static_cast<std::int64_t>(out.ids.size()));
    }
    return out;
}

}  // namespace pocl
