// The innermost product: C [M, N] fp32 = A · B, or += where `add`. A [M, K] bf16, rows `ld_a` apart. B [K / 2, ld_b, 2] bf16: two
// neighbouring rows interleaved, as the processor's dot product takes them. K is even. Leading dimensions count elements.
#pragma once
#include <cstdint>

namespace pocl {

/// oneDNN's, made at run time for each shape and for the processor (AVX-512 or AMX), out of the torch that this process has loaded.
/// Null where torch has none of this signature, where the processor cannot multiply bf16, or where a trial went wrong.
struct MicroKernel {
    void (*multiply)(long M, long N, long K, long ld_a, long ld_b, long ld_c, bool add, const std::uint16_t* A, const std::uint16_t* B,
                     float* C, bool interleaved) = nullptr;
    void (*release)(bool interleaved) = nullptr;  // ends a thread's use: AMX has a state

    explicit operator bool() const { return multiply != nullptr; }
};

/// Found and tried once.
const MicroKernel& micro_kernel() noexcept;

}  // namespace pocl
