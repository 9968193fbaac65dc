#include "products/micro_kernel.h"

#include <dlfcn.h>

#include <array>

namespace pocl {
namespace {

// at::native::cpublas::brgemm(long x 6, bool, const BFloat16*, const BFloat16*, float*, bool). A mangled name holds its arguments'
// types: with others it is not found.
constexpr const char* kMultiply = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
constexpr const char* kRelease = "_ZN2at6native7cpublas14brgemm_releaseEb";
constexpr const char* kLibrary = "libtorch_cpu.so";

bool multiplies_bf16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

std::uint16_t bf16(int value) {  // exact for small integers
    const float number = static_cast<float>(value);
    std::uint32_t bits;
    __builtin_memcpy(&bits, &number, sizeof bits);
    return static_cast<std::uint16_t>(bits >> 16);
}

/// A trial of a shape as products.cpp has them, with small integers, whose sums are exact: added to what was there, nothing beyond [M, N].
bool works(const MicroKernel& kernel) {
    constexpr int M = 5, N = 37, K = 32, kLdA = 64, kLdB = 64, kLdC = 64;
    std::array<std::uint16_t, M * kLdA> A{};
    std::array<std::uint16_t, K * kLdB> B{};
    std::array<float, M * kLdC> C;
    C.fill(7.0f);
    const auto a = [](int m, int k) { return m - 2 * k + 3; };
    const auto b = [](int k, int n) { return 3 * k - n; };
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; ++k) A[static_cast<std::size_t>(m * kLdA + k)] = bf16(a(m, k));
    for (int k = 0; k < K; ++k)
        for (int n = 0; n < N; ++n) B[static_cast<std::size_t>((k / 2 * kLdB + n) * 2 + k % 2)] = bf16(b(k, n));
    kernel.multiply(M, N, K, kLdA, kLdB, kLdC, true, A.data(), B.data(), C.data(), true);
    kernel.release(true);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < kLdC; ++n) {
            int want = 7;
            for (int k = 0; k < K && n < N; ++k) want += a(m, k) * b(k, n);
            if (C[static_cast<std::size_t>(m * kLdC + n)] != static_cast<float>(want)) return false;
        }
    return true;
}

MicroKernel find() noexcept {
    if (!multiplies_bf16()) return {};
    void* const torch = dlopen(kLibrary, RTLD_NOLOAD | RTLD_LAZY);  // Python loads it for itself alone: RTLD_DEFAULT lacks it
    if (torch == nullptr) return {};
    MicroKernel kernel;
    kernel.multiply = reinterpret_cast<decltype(kernel.multiply)>(dlsym(torch, kMultiply));
    kernel.release = reinterpret_cast<decltype(kernel.release)>(dlsym(torch, kRelease));
    if (kernel.multiply == nullptr || kernel.release == nullptr) return {};
    try {
        if (works(kernel)) return kernel;
    } catch (...) {  // torch's way to say that this processor or this build has none
    }
    return {};
}

}  // namespace

const MicroKernel& micro_kernel() noexcept {
    static const MicroKernel kernel = find();
    return kernel;
}

}  // namespace pocl
