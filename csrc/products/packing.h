// Matrices rewritten for the micro-kernel: to bf16, padded with zeros, interleaved by pairs, transposed. Sources are bf16 or fp32.
// Compiled for AVX-512 with bf16; call only where micro_kernel() is there.
#pragma once
#include "matrix/matrix.h"

namespace pocl {

constexpr std::int64_t kBlock = 64;     // columns of B that the micro-kernel multiplies at a time
constexpr std::int64_t kMultiple = 32;  // K is padded to one of it: what an AMX tile holds

/// to [rows, K] = from's, K the columns padded. The factor A as it lies.
void pack_rows(const Matrix& from, std::uint16_t* to);

/// to [columns, K] = fromᵀ, K the rows padded. The factor A, of a transposed product.
void pack_columns(const Matrix& from, std::uint16_t* to);

/// to [columns / kBlock, K / 2, kBlock, 2], K the rows padded, the last block's columns too. The factor B as it lies.
void pack_pairs(const Matrix& from, std::uint16_t* to);

/// to [K / 2, kBlock, 2], K the columns padded, of at most kBlock rows. The factor B, transposed.
void pack_pairs_transposed(const Matrix& from, std::uint16_t* to);

/// to = from + bias (or null), [rows, columns] fp32 with columns <= kBlock, from's rows kBlock apart; past the caches where it can be.
void stream_rows(const float* from, const float* bias, const Matrix& to);

/// Asks for one of so many pieces of a matrix, by its rows, to be brought into the second-level cache. Factors come from memory row by
/// row in short runs, which no processor foresees: the pieces of the next block are asked for while this one is multiplied.
void prefetch(const Matrix& of, std::int64_t piece, std::int64_t pieces);

constexpr std::int64_t padded(std::int64_t count, std::int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace pocl
