// Vectors of POCL_VECTOR_BYTES, in the compilers' own vector types: the same source gives SSE2, NEON, AVX2 and AVX-512 code.
// Everything is in an anonymous namespace, and nothing here calls an inline function of the standard library: were such a
// function compiled for AVX-512 in one file, the linker might choose that copy for all of them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

inline float max_lane(Float x) {
    float best = x[0];
    for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
    return best;
}
inline double sum_lanes(Float x) {
    double sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += x[i];
    return sum;
}
inline bool any(Int mask) {
    std::int32_t found = 0;
    for (int i = 0; i < kWidth; ++i) found |= mask[i];
    return found != 0;
}

/// e^x for x <= 0 (or NaN), to 1 ulp; 0 below the smallest normal number.
inline Float exp_negative(Float x) {
    const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Float shifted = x * 1.44269504f + magic;
    const Float n = shifted - magic;
    Float r = n * -0.693359375f + x;             // x - n ln 2, ln 2 in two parts (Cody and Waite)
    r = n * 2.12194440e-4f + r;
    Float p = r * 1.38146116e-3f + 8.36871099e-3f;  // e^r for |r| <= ln 2 / 2, minimax for the relative error
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Float result = (Float)((Int)p + ((Int)shifted << 23));  // times 2^n: the bits of `magic` fall off at the top
    return select(x < -87.3365f, Float{}, result);
}

// ---- rows in memory, by dtype -------------------------------------------------------------------------------------------

struct F32 {
    using Storage = float;
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
    static Float load(const Storage* p) {
        Half bits;
        std::memcpy(&bits, p, sizeof bits);
        return Format::widen(__builtin_convertvector(bits, Word));
    }
    static void store(Storage* p, Float x) {
        const Half bits = __builtin_convertvector(Format::narrow(x), Half);
        std::memcpy(p, &bits, sizeof bits);
    }
    static void stream(Storage* p, Float x) {
#if defined(__AVX512F__)
        _mm256_stream_si256((__m256i*)p, (__m256i)__builtin_convertvector(Format::narrow(x), Half));
#elif defined(__AVX2__)
        _mm_stream_si128((__m128i*)p, (__m128i)__builtin_convertvector(Format::narrow(x), Half));
#else
        store(p, x);
#endif
    }
};

struct BFloat16Bits {
    static Float widen(Word bits) { return (Float)(bits << 16); }
    static Word narrow(Float x) {  // to nearest, ties to even; a NaN stays one
        const Word bits = (Word)x;
        const Word rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        return x == x ? rounded : (bits >> 16) | 0x40u;
    }
};

struct Float16Bits {
    static Float widen(Word bits) {
        const Word sign = (bits & 0x8000u) << 16;
        const Word body = (bits & 0x7FFFu) << 13;
        const Float scaled = (Float)body * 5.192296858534828e33f;  // 2^112 moves the exponent's bias; exact for subnormals too
        const Word special = (Word)(body >= (Word{} + 0x0F800000u));  // infinity and NaN
        return (Float)(((Word)scaled | (special & 0x7F800000u)) | sign);
    }
    static Word narrow(Float x) {  // to nearest, ties to even; overflow to infinity
        const Word bits = (Word)x;
        const Word sign = (bits >> 16) & 0x8000u;
        const Word body = bits & 0x7FFFFFFFu;
        const Word normal = (body - (112u << 23) + 0xFFFu + ((body >> 13) & 1u)) >> 13;
        const Float tiny = (Float)body + 0.5f;  // adding 0.5 leaves a subnormal's bits, rounded, at the bottom
        const Word subnormal = (Word)tiny - 0x3F000000u;
        Word result = body < (Word{} + (113u << 23)) ? subnormal : normal;
        result = body >= (Word{} + 0x47800000u) ? Word{} + 0x7C00u : result;
        result = x == x ? result : Word{} + 0x7E00u;
        return result | sign;
    }
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

}  // namespace
}  // namespace pocl
