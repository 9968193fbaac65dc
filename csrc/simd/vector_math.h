// Exponentials and logarithms on vectors, in base 2 where that saves work: every e^x of a softmax is 2^(x log2 e).
// Polynomials are minimax for the relative error; tests/loss/reference/test_vector_math.py measures what is left after rounding.
#pragma once
#include "simd/vector.h"

namespace pocl {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kLn2f = 0.693147181f;

/// (2^r - 1) / r for |r| <= 1/2.
inline Float exp2_slope(Float r) {
    Float p = r * 1.54035122e-4f + 1.33907353e-3f;
    p = p * r + 9.61823761e-3f;
    p = p * r + 5.55035733e-2f;
    p = p * r + 2.40226492e-1f;
    return p * r + 6.93147182e-1f;
}

/// The nearest integer to y, and 2^n of an integer n times p; below 2^-126 the result is 0. NaN stays NaN.
#if defined(__AVX512F__)
inline Float nearest(Float y) { return (Float)_mm512_maskz_roundscale_ps(kAll, (__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Float scaled(Float p, Float n) { return (Float)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)n); }
#else
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits
inline Float nearest(Float y) { return max(broadcast(-200.0f), y) + kMagic - kMagic; }
inline Float scaled(Float p, Float n, Float low) {  // low: the result below 2^-126
    return select(n >= -126.0f, (Float)((Int)p + ((Int)(n + kMagic) << 23)), low);  // the bits of kMagic fall off at the top
}
inline Float scaled(Float p, Float n) { return scaled(p, n, select(n == n, Float{}, n)); }
#endif

#if defined(__AVX512F__)
// 2^(i/32)
constexpr Float kPowers[2] = {{1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
                               1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f},
                              {1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
                               1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f}};
constexpr float kToSteps = 393216.0f;  // 1.5 * 2^18: adding it rounds to thirty-seconds, whose number then is in the low bits

/// 2^(n + r) of `rounded` = n + kToSteps, |r| <= 1/64: 2^floor(n), the thirty-seconds by a table in registers, and 2^r by a polynomial.
inline Float exp2_of_parts(Float rounded, Float n, Float r) {
    const Float power = (Float)_mm512_permutex2var_ps((__m512)kPowers[0], (__m512i)rounded, (__m512)kPowers[1]);
    const Float whole = scaled(power, n);
    return fma(whole * r, fma(broadcast(0.240228856f), r, broadcast(0.693157341f)), whole);
}
#elif defined(__AVX2__)
// The bits of 2^(i/8), less i << 20: with the number of eighths << 20 they are those of its power of 2.
constexpr Int kPowers = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
constexpr float kToSteps = 1572864.0f;  // 1.5 * 2^20: adding it rounds to eighths, whose number then is in the low bits

/// 2^(n + r) of `rounded` = n + kToSteps, |r| <= 1/16; where n is below -126 it is 0, where n is infinite NaN.
inline Float exp2_of_parts(Float rounded, Float n, Float r) {
    const Int eighth = (Int)_mm256_permutevar8x32_epi32((__m256i)kPowers, (__m256i)rounded);
    const Float whole = (Float)(eighth + ((Int)rounded << 20));  // the bits of kToSteps fall off at the top
    const Float slope = fma(fma(broadcast(0.055496223f), r, broadcast(0.24025764f)), r, broadcast(0.69314724f));
    return select(n >= -126.0f, fma(whole * r, slope, whole), n - n);
}
#endif

#if defined(__AVX2__)
/// 2^(x * factor), the product below 127 and not rounded by itself. NaN where it is -inf.
inline Float exp2_of(Float x, Float factor) {
    const Float rounded = fma(x, factor, broadcast(kToSteps)), n = rounded - kToSteps;
    return exp2_of_parts(rounded, n, fma(x, factor, -n));
}
/// 2^y for y below 127, also of -inf.
inline Float exp2_of(Float y) {
    const Float finite = max(broadcast(-1000.0f), y), rounded = finite + kToSteps, n = rounded - kToSteps;
    return exp2_of_parts(rounded, n, finite - n);
}
#else
/// 2^y for y below 127, also of -inf.
inline Float exp2_of(Float y) {
    const Float n = nearest(y), r = y - n;
    return scaled(exp2_slope(r) * r + 1.0f, n);
}
/// 2^(x * factor), the product below 127. NaN where it is -inf.
inline Float exp2_of(Float x, Float factor) {
    const Float y = x * factor, n = nearest(y), r = fma(x, factor, -n);
    return scaled(exp2_slope(r) * r + 1.0f, n, y - y);
}
#endif

/// 2^y - 1 for y <= 0, with all its digits also where y is near 0; `power` becomes 2^y.
inline Float exp2_minus_1(Float y, Float& power) {
    const Float n = nearest(y), r = y - n, w = exp2_slope(r) * r;
    power = scaled(w + 1.0f, n);
    return select(n == 0.0f, w, power - 1.0f);
}

/// P(x) of log(1 + x) = x - x^2 / 2 + x^3 P(x), 1 + x between the square roots of 1/2 and 2.
inline Float log1p_tail(Float x) {
    Float p = x * -7.63449892e-2f + 1.27615780e-1f;
    p = p * x - 1.31601826e-1f;
    p = p * x + 1.42017573e-1f;
    p = p * x - 1.66233569e-1f;
    p = p * x + 2.00012267e-1f;
    p = p * x - 2.50008196e-1f;
    return p * x + 3.33333313e-1f;
}

/// The e of m 2^e, m between the square roots of 1/2 and 2, of a positive normal number's bits.
inline Int exponent_of(Int bits) { return (bits - 0x3f3504f3) >> 23; }

/// log(1 + z) for -1 < z <= 0.4, with all its digits also where z is near 0; the natural logarithm.
inline Float log1p_of(Float z) {
    const Int bits = (Int)(z + 1.0f);
    const Int e = exponent_of(bits);
    const Float m = (Float)(bits - (e << 23));
    const Float x = select(e == 0, z, m - 1.0f);
    const Float square = x * x;
    const Float low = log1p_tail(x) * x * square - 0.5f * square + __builtin_convertvector(e, Float) * -2.12194440e-4f;
    const Float sum = low + x + __builtin_convertvector(e, Float) * 0.693359375f;  // ln 2 in two parts (Cody and Waite)
    return select(z == z, sum, z);
}

/// log2 of a positive normal number, to an absolute 1e-8 or two units of the last digit, whichever is more. Of 0 and subnormal numbers it
/// is between -127 and -126; of NaN some number.
#if defined(__AVX512F__)
constexpr Float kCentres = {0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
                            0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f, 0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f};
constexpr Float kLogs = {0.0443940759f, 0.129283011f, 0.209453329f, 0.285402209f, 0.357552052f, 0.426264763f, 0.491853058f, 0.554588914f,
                         -0.385290116f, -0.3275747f, -0.272079557f, -0.218640238f, -0.167109996f, -0.117356956f, -0.0692625791f, -0.02272016f};

/// By tables in registers: one over the centre of each sixteenth of [1, 2), and minus its log2, but for those above 1.5, which belong to
/// the next power of 2: so the logarithm of a number near 1 is no difference of large ones.
inline Float log2_of(Float m) {
    const __m512i sixteenth = (__m512i)((Word)m >> 19);  // in the lowest 4 bits
    const Float e = (Float)_mm512_maskz_getexp_ps(kAll, (__m512)((Word)m + 0x00400000u));
    const Float mantissa = (Float)(((Word)m & 0x007FFFFFu) | 0x3F800000u);
    const Float x = mantissa * (Float)_mm512_maskz_permutexvar_ps(kAll, sixteenth, (__m512)kCentres) - 1.0f;
    const Float base = e + (Float)_mm512_maskz_permutexvar_ps(kAll, sixteenth, (__m512)kLogs);
    const Float slope = ((x * -0.361038953f + 0.481228948f) * x - 0.721347392f) * x + 1.44269502f;
    return slope * x + base;
}
#else
inline Float log2_of(Float m) {
    const Int bits = (Int)m;
    const Int e = exponent_of(bits);
    const Float x = (Float)(bits - (e << 23)) - 1.0f;
    const Float tail = log1p_tail(x) * x - 0.5f;
    return (tail * (x * x) + x) * kLog2E + __builtin_convertvector(e, Float);
}
#endif

/// tanh(x) of a finite x, with all its digits also where x is near 0; NaN stays.
inline Float tanh_of(Float x) {
    const Float magnitude = select(x < 0.0f, -x, x);
    Float unused;
    const Float e = exp2_minus_1(magnitude * (-2.0f * kLog2E), unused);
    const Float t = -e / (e + 2.0f);
    return select(x < 0.0f, -t, t);
}

/// See rows.h.
inline void math(int function, const float* in, float* out, std::int64_t count) {
    for (std::int64_t v = 0; v < count; v += kWidth) {
        const int here = count - v < kWidth ? static_cast<int>(count - v) : kWidth;
        const Float x = load_some<F32>(in + v, here, 0.0f);
        Float power;
        const Float y = function == 0 ? exp2_of(x) : function == 1 ? exp2_minus_1(x, power)
                        : function == 2 ? log1p_of(x) : function == 3 ? tanh_of(x) : function == 4 ? log2_of(x) : exp2_of(x, broadcast(kLog2E));
        store_some<F32>(out + v, y, here);
    }
}

}  // namespace
}  // namespace pocl
