// Vectors of POCL_VECTOR_BYTES, in the compilers' own vector types: the same source gives SSE2, NEON, AVX2 and AVX-512 code.
// Everything is in an anonymous namespace, and nothing here calls an inline function of the standard library: were such a
// function compiled for AVX-512 in one file, the linker might choose that copy for all of them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For loops and their bodies: a body that the compiler calls instead has its sums in memory.
#define POCL_INLINE __attribute__((always_inline))
// For what many instances of a template call once a row: compiled once, not into each of them.
#define POCL_ONCE __attribute__((noinline))

namespace pocl {
namespace {

constexpr int kWidth = POCL_VECTOR_BYTES / 4;
typedef float Float __attribute__((vector_size(POCL_VECTOR_BYTES)));
typedef std::int32_t Int __attribute__((vector_size(POCL_VECTOR_BYTES)));  // also the type of comparisons: 0 or -1 a lane
typedef std::uint32_t Word __attribute__((vector_size(POCL_VECTOR_BYTES)));
typedef std::uint16_t Half __attribute__((vector_size(POCL_VECTOR_BYTES / 2)));

constexpr float kInf = __builtin_inff();

inline Float broadcast(float x) { return x - Float{}; }
inline Float select(Int mask, Float yes, Float no) { return mask ? yes : no; }
/// The greater, or smaller, of each lane; b where a is NaN. One instruction each, which compilers do not find by themselves.
#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xFFFF;  // the unmasked forms make GCC 12 warn of its own header
inline Float max(Float a, Float b) { return (Float)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b); }
inline Float min(Float a, Float b) { return (Float)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Float max(Float a, Float b) { return (Float)_mm256_max_ps((__m256)a, (__m256)b); }
inline Float min(Float a, Float b) { return (Float)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Float max(Float a, Float b) { return a > b ? a : b; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
#endif

/// a b + c, rounded once where the processor can, in every place alike.
#if defined(__AVX512F__)
inline Float fma(Float a, Float b, Float c) { return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
inline Float fma(Float a, Float b, Float c) { return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
#endif

#if defined(__AVX2__)
/// Both halves by `with`, and so on down to one lane. Compilers take a dozen instructions a step by themselves.
template <class With>
POCL_INLINE inline float fold(Float x, With&& with) {
#if defined(__AVX512F__)
    const __m256 eight = with((__v8sf)_mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 0), (__v8sf)_mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 1));
#else
    const __m256 eight = (__m256)x;
#endif
    const __m128 four = with((__v4sf)_mm256_castps256_ps128(eight), (__v4sf)_mm256_extractf128_ps(eight, 1));
    const __m128 two = with((__v4sf)four, (__v4sf)_mm_movehl_ps(four, four));
    return with(two[0], two[1]);
}
inline float max_lane(Float x) {
    return fold(x, [](auto a, auto b) POCL_INLINE { return a > b ? a : b; });
}
inline double sum_lanes(Float x) {
    return fold(x, [](auto a, auto b) POCL_INLINE { return a + b; });
}
#else
inline float max_lane(Float x) {
    float best = x[0];
    for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
    return best;
}
inline double sum_lanes(Float x) {
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
#endif
/// Whether any lane of a comparison holds.
#if defined(__AVX512F__)
inline bool any(Int mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
#elif defined(__AVX2__)
inline bool any(Int mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#else
inline bool any(Int mask) {
    std::int32_t found = 0;
    for (int i = 0; i < kWidth; ++i) found |= mask[i];
    return found != 0;
}
#endif

// ---- rows in memory, by dtype -------------------------------------------------------------------------------------------

/// 2 kWidth neighbouring elements of a row, in an order that the row's format chooses: `place` of an element is its lane in a, or
/// kWidth more than its lane in b.
struct Two {
    Float a, b;
};
constexpr int kTwo = 2 * kWidth;

struct F32 {
    using Storage = float;
    static constexpr int place(int i) { return i; }
    static Two load_two(const Storage* p) { return {load(p), load(p + kWidth)}; }
    static void store_two(Storage* p, Two x) {
        store(p, x.a);
        store(p + kWidth, x.b);
    }
    static void stream_two(Storage* p, Two x) {
        stream(p, x.a);
        stream(p + kWidth, x.b);
    }
    static Float load(const Storage* p) {
        Float x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(Storage* p, Float x) { std::memcpy(p, &x, sizeof x); }
    static void stream(Storage* p, Float x) {
#if defined(__AVX512F__)
        _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
        _mm256_stream_ps(p, (__m256)x);
#else
        store(p, x);
#endif
    }
};

/// The two 16-bit formats: bits in and out by `Format`, memory here.
template <class Format>
struct F16 {
    using Storage = std::uint16_t;
    static constexpr int place(int i) { return Format::place(i); }
    static Two load_two(const Storage* p) {
        Word bits;
        std::memcpy(&bits, p, sizeof bits);
        return Format::widen_two(bits);
    }
    static void store_two(Storage* p, Two x) {
        const Word bits = Format::narrow_two(x);
        std::memcpy(p, &bits, sizeof bits);
    }
    static void stream_two(Storage* p, Two x) {
#if defined(__AVX512F__)
        _mm512_stream_si512((__m512i*)p, (__m512i)Format::narrow_two(x));
#elif defined(__AVX2__)
        _mm256_stream_si256((__m256i*)p, (__m256i)Format::narrow_two(x));
#else
        store_two(p, x);
#endif
    }
    static Float load(const Storage* p) {
        Half bits;
        std::memcpy(&bits, p, sizeof bits);
        return Format::widen(bits);
    }
    static void store(Storage* p, Float x) {
        const Half bits = Format::narrow(x);
        std::memcpy(p, &bits, sizeof bits);
    }
};

/// 16-bit lanes to 32-bit ones and back, the upper halves dropped: compilers take several instructions for it by themselves.
#if defined(__AVX512F__)
inline Word lengthen(Half x) { return (Word)_mm512_maskz_cvtepu16_epi32(kAll, (__m256i)x); }
inline Half shorten(Word x) { return (Half)_mm512_maskz_cvtepi32_epi16(kAll, (__m512i)x); }
#elif defined(__AVX2__)
inline Word lengthen(Half x) { return (Word)_mm256_cvtepu16_epi32((__m128i)x); }
inline Half shorten(Word x) {
    const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x88));
}
#else
inline Word lengthen(Half x) { return __builtin_convertvector(x, Word); }
inline Half shorten(Word x) { return __builtin_convertvector(x, Half); }
#endif

/// A word holds two elements; the first, in its lower half, goes to a. Neither way takes a permutation.
struct BFloat16Bits {
    static constexpr int place(int i) { return i % 2 * kWidth + i / 2; }
    static Two widen_two(Word bits) { return {(Float)(bits << 16), (Float)(bits & 0xFFFF0000u)}; }
    static Word narrow_two(Two x) { return (rounded((Word)x.a) >> 16) | (rounded((Word)x.b) & 0xFFFF0000u); }
    static Float widen(Half bits) { return (Float)(lengthen(bits) << 16); }
    static Half narrow(Float x) {  // to nearest, ties to even; a NaN stays one
        return shorten(x == x ? rounded((Word)x) >> 16 : Word{} + 0x7FC0u);
    }

  private:
    /// The upper half is the result. Of a NaN it is one, but for payloads that arithmetic does not make.
    static Word rounded(Word bits) { return bits + 0x7FFFu + ((bits >> 16) & 1u); }
};

struct Float16Bits {
    static constexpr int place(int i) { return i; }
    static Two widen_two(Word bits) {
        Half halves[2];
        std::memcpy(halves, &bits, sizeof bits);
        return {widen(halves[0]), widen(halves[1])};
    }
    static Word narrow_two(Two x) {
        const Half halves[2] = {narrow(x.a), narrow(x.b)};
        Word bits;
        std::memcpy(&bits, halves, sizeof bits);
        return bits;
    }
#if defined(__AVX512F__)
    static Float widen(Half bits) { return (Float)_mm512_maskz_cvtph_ps(kAll, (__m256i)bits); }
    static Half narrow(Float x) { return (Half)_mm512_maskz_cvtps_ph(kAll, (__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
    static Float widen(Half bits) { return (Float)_mm256_cvtph_ps((__m128i)bits); }
    static Half narrow(Float x) { return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
    static Float widen(Half half) {
        const Word bits = lengthen(half);
        const Word sign = (bits & 0x8000u) << 16;
        const Word body = (bits & 0x7FFFu) << 13;
        const Float scaled = (Float)body * 5.192296858534828e33f;  // 2^112 moves the exponent's bias; exact for subnormals
        const Word special = (Word)(body >= (Word{} + 0x0F800000u));  // infinity and NaN
        return (Float)(((Word)scaled | (special & 0x7F800000u)) | sign);
    }
    static Half narrow(Float x) {  // to nearest, ties to even; overflow to infinity
        const Word bits = (Word)x;
        const Word sign = (bits >> 16) & 0x8000u;
        const Word body = bits & 0x7FFFFFFFu;
        const Word normal = (body - (112u << 23) + 0xFFFu + ((body >> 13) & 1u)) >> 13;
        const Float tiny = (Float)body + 0.5f;  // adding 0.5 leaves a subnormal's bits, rounded, at the bottom
        const Word subnormal = (Word)tiny - 0x3F000000u;
        Word result = body < (Word{} + (113u << 23)) ? subnormal : normal;
        result = body >= (Word{} + 0x47800000u) ? Word{} + 0x7C00u : result;
        result = x == x ? result : Word{} + 0x7E00u;
        return shorten(result | sign);
    }
#endif
};

using BF16 = F16<BFloat16Bits>;
using FP16 = F16<Float16Bits>;

/// The first `count` < kWidth elements at p, the rest `fill`.
template <class Format>
inline Float load_some(const typename Format::Storage* p, int count, float fill) {
    typename Format::Storage some[kWidth] = {};
    for (int i = 0; i < count && i < kWidth; ++i) some[i] = p[i];
    Float x = Format::load(some);
    for (int i = count; i < kWidth; ++i) x[i] = fill;
    return x;
}

template <class Format>
inline void store_some(typename Format::Storage* p, Float x, int count) {
    typename Format::Storage all[kWidth];
    Format::store(all, x);
    for (int i = 0; i < count && i < kWidth; ++i) p[i] = all[i];
}

/// The same of 2 kWidth elements.
template <class Format>
__attribute__((noinline)) Two load_some_two(const typename Format::Storage* p, int count, float fill) {
    typename Format::Storage some[kTwo] = {};
    for (int i = 0; i < count && i < kTwo; ++i) some[i] = p[i];
    Two x = Format::load_two(some);
    for (int i = count; i < kTwo; ++i) {
        const int place = Format::place(i);
        if (place < kWidth) x.a[place] = fill;
        else x.b[place - kWidth] = fill;
    }
    return x;
}

template <class Format>
__attribute__((noinline)) void store_some_two(typename Format::Storage* p, Two x, int count) {
    typename Format::Storage all[kTwo];
    Format::store_two(all, x);
    for (int i = 0; i < count && i < kTwo; ++i) p[i] = all[i];
}

}  // namespace
}  // namespace pocl
