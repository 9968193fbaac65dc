#include <immintrin.h>

#include "products/packing.h"

namespace pocl {
namespace {

using Int = std::int64_t;

inline Int least(Int a, Int b) { return a < b ? a : b; }  // not std::min, whose one copy for all builds would be this one
inline __mmask32 first(Int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

/// One row's elements [column, column + count), count at most 32, as bf16; 0 beyond.
inline __m512i load(const Matrix& from, Int row, Int column, Int count) {
    if (row >= from.rows) return _mm512_setzero_si512();
    const Int at = row * from.row_stride + column;
    const __mmask32 mask = first(count);
    if (from.dtype == DType::bfloat16) return _mm512_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(from.data) + at);
    const float* const x = static_cast<const float*>(from.data) + at;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + 16);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// GCC 12 takes the forms without a mask for uses of an uninitialised number
constexpr __mmask16 kAll = 0xffff;

/// x[i] becomes the i-th 32 bits of all sixteen.
inline void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_maskz_unpacklo_epi32(kAll, x[i], x[i + 1]);
        y[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_maskz_unpacklo_epi64(kAll & 0xff, y[i], y[i + 2]);
        x[i + 1] = _mm512_maskz_unpackhi_epi64(kAll & 0xff, y[i], y[i + 2]);
        x[i + 2] = _mm512_maskz_unpacklo_epi64(kAll & 0xff, y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_maskz_unpackhi_epi64(kAll & 0xff, y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        y[i] = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        x[i] = _mm512_maskz_shuffle_i32x4(kAll, y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, y[i], y[i + 8], 0xdd);
    }
}

/// Where the elements of two rows of 32, low and high half, go when they are interleaved.
inline __m512i interleaving(int half) {
    std::uint16_t order[32];
    for (int i = 0; i < 16; ++i) {
        order[2 * i] = static_cast<std::uint16_t>(16 * half + i);
        order[2 * i + 1] = static_cast<std::uint16_t>(32 + 16 * half + i);
    }
    return _mm512_loadu_si512(order);
}

}  // namespace

void pack_rows(const Matrix& from, std::uint16_t* to) {
    const Int K = padded(from.columns, kMultiple);
    for (Int row = 0; row < from.rows; ++row)
        for (Int k = 0; k < K; k += 32) _mm512_storeu_si512(to + row * K + k, load(from, row, k, from.columns - k));
}

void pack_columns(const Matrix& from, std::uint16_t* to) {
    const Int K = padded(from.rows, kMultiple);
    const __m512i low = interleaving(0), high = interleaving(1);
    for (Int k = 0; k < K; k += 32) {
        for (Int column = 0; column < from.columns; column += 32) {
            const Int count = from.columns - column;
            __m512i x[16], y[16];
            for (int i = 0; i < 16; ++i) {
                const __m512i even = load(from, k + 2 * i, column, count), odd = load(from, k + 2 * i + 1, column, count);
                x[i] = _mm512_permutex2var_epi16(even, low, odd);
                y[i] = _mm512_permutex2var_epi16(even, high, odd);
            }
            transpose(x);
            transpose(y);
            for (int i = 0; i < least(count, 16); ++i) _mm512_storeu_si512(to + (column + i) * K + k, x[i]);
            for (int i = 0; i < least(count - 16, 16); ++i) _mm512_storeu_si512(to + (column + 16 + i) * K + k, y[i]);
        }
    }
}

void pack_pairs(const Matrix& from, std::uint16_t* to) {
    const Int K = padded(from.rows, kMultiple);
    const __m512i low = interleaving(0), high = interleaving(1);
    for (Int k = 0; k < K; k += 2) {
        for (Int column = 0; column < padded(from.columns, kBlock); column += 32) {
            const Int count = from.columns - column;
            const __m512i even = load(from, k, column, count), odd = load(from, k + 1, column, count);
            std::uint16_t* const pairs = to + column / kBlock * K * kBlock + k * kBlock + column % kBlock * 2;
            _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

void pack_pairs_transposed(const Matrix& from, std::uint16_t* to) {
    const Int K = padded(from.columns, kMultiple);
    for (Int row = 0; row < kBlock; row += 16) {
        for (Int k = 0; k < K; k += 32) {
            __m512i x[16];
            for (int i = 0; i < 16; ++i) x[i] = load(from, row + i, k, from.columns - k);
            transpose(x);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (k / 2 + i) * kBlock * 2 + row * 2, x[i]);
        }
    }
}

void stream_rows(const float* from, const float* bias, const Matrix& to) {
    float* const out = static_cast<float*>(to.data);
    const bool aligned = reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && to.row_stride % 16 == 0;
    for (Int row = 0; row < to.rows; ++row) {
        for (Int column = 0; column < to.columns; column += 16) {
            const auto mask = static_cast<__mmask16>(first(least(to.columns - column, 16)));
            __m512 x = _mm512_loadu_ps(from + row * kBlock + column);
            if (bias != nullptr) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, bias + column));
            float* const y = out + row * to.row_stride + column;
            if (aligned && mask == 0xffff)
                _mm512_stream_ps(y, x);
            else
                _mm512_mask_storeu_ps(y, mask, x);
        }
    }
    _mm_sfence();  // such stores are not ordered with the ones by which a thread says that it is done
}

void prefetch(const Matrix& of, Int piece, Int pieces) {
    const Int bytes = of.dtype == DType::float32 ? 4 : 2;
    for (Int row = of.rows * piece / pieces; row < of.rows * (piece + 1) / pieces; ++row) {
        const char* const begin = static_cast<const char*>(of.data) + row * of.row_stride * bytes;
        for (Int at = 0; at < of.columns * bytes; at += 64) _mm_prefetch(begin + at, _MM_HINT_T1);
    }
}

}  // namespace pocl
