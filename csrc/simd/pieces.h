// A row cut into blocks, and blocks into vectors: the order in which every sweep goes over a row.
#pragma once
#include "simd/vector.h"

namespace pocl {
namespace {

constexpr std::int64_t kBlock = 64 * kTwo;  // 128 terms a lane, whose fp32 sums lose the more digits the more there are
constexpr std::int64_t kAhead = 2048;       // entries from a read one to one that the caches are to take in

struct Whole { static constexpr bool value = false; };
struct Rest { static constexpr bool value = true; };

/// A row of V entries. Its first `head` < 2 kWidth are a piece of their own, so that those after them lie on whole vectors of the
/// gradient's memory, as streaming stores need. Each piece has its place in scratch, 2 kWidth numbers, also where it is shorter.
struct Pieces {
    std::int64_t V, head;
    std::int64_t blocks() const { return V <= head ? 1 : (V - head + kBlock - 1) / kBlock; }
    std::int64_t begin(std::int64_t block) const { return block == 0 ? 0 : head + block * kBlock; }
    std::int64_t end(std::int64_t block) const { return head + (block + 1) * kBlock < V ? head + (block + 1) * kBlock : V; }
    std::int64_t place(std::int64_t v) const { return head == 0 ? v : v < head ? 0 : v - head + kTwo; }
    /// Whether the pieces of both begin at the same places, as far as both have any.
    bool in_step(const Pieces& other) const { return (head == 0) == (other.head == 0); }
};

/// Calls body(first entry, count, place in scratch, Whole or Rest) over the pieces of a block, of 2 kWidth entries but for a few.
template <class Body>
POCL_INLINE inline void for_pieces(const Pieces& pieces, std::int64_t block, Body&& body) {
    std::int64_t v = pieces.begin(block);
    const std::int64_t end = pieces.end(block);
    if (block == 0 && pieces.head > 0) {
        v = pieces.head < end ? pieces.head : end;
        body(std::int64_t{0}, static_cast<int>(v), std::int64_t{0}, Rest{});
    }
    for (; v + kTwo <= end; v += kTwo) body(v, kTwo, pieces.place(v), Whole{});
    if (v < end) body(v, static_cast<int>(end - v), pieces.place(v), Rest{});
}

/// Calls body(position, count, Whole) over the whole vectors of [begin, end), then body(position, count, Rest) for what remains.
template <class Body>
POCL_INLINE inline void for_vectors(std::int64_t begin, std::int64_t end, Body&& body) {
    std::int64_t v = begin;
    for (; v + kWidth <= end; v += kWidth) body(v, kWidth, Whole{});
    if (v < end) body(v, static_cast<int>(end - v), Rest{});
}

template <class Format, bool Some>
inline Float load(const typename Format::Storage* p, int count, float fill) {
    if constexpr (Some) return load_some<Format>(p, count, fill);
    else return Format::load(p);
}

template <class Format, bool Some>
inline Two load_two(const typename Format::Storage* p, int count, float fill) {
    if constexpr (Some) return load_some_two<Format>(p, count, fill);
    else return Format::load_two(p);
}

template <class Format, bool Some>
inline void store(typename Format::Storage* p, Float x, int count) {
    if constexpr (Some) store_some<Format>(p, x, count);
    else Format::store(p, x);
}

/// Has the cache take in a line, which need not be the program's own memory.
inline void fetch(const void* line) { __builtin_prefetch(line, 0, 3); }

}  // namespace
}  // namespace pocl
