// Texts to words, and words to ids. No Python, no torch.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace pocl {

/// A text as code points of `width` bytes each (1, 2 or 4), which is how Python holds a string.
struct CodePoints {
    const void* data;
    std::int64_t size;
    int width;
};

/// Texts as word ids, one behind the other: text i is ids[offsets[i]] to ids[offsets[i + 1]], and id w is the word words[w].
struct Tokens {
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> offsets;
    std::vector<std::string> words;
};

/// Cuts texts into rouge-score's words: the runs of a-z and 0-9 in the text lower-cased as Python's str.lower does it. Which id
/// a word gets may depend on `threads`, the words of a text do not.
Tokens tokenize(std::span<const CodePoints> texts, int threads);

/// The same texts with forms[id] in the place of each id, and without the words whose form is negative. Without `words`.
Tokens with_forms(const Tokens& tokens, std::span<const std::int32_t> forms);

}  // namespace pocl
