// The instruction sets that the row kernels are compiled for. No Python, no torch.
#pragma once

namespace pocl {

enum class Isa { plain, avx2, avx512 };

/// Whether this processor, and this build, can run the kernels of an instruction set.
bool supports(Isa isa) noexcept;

/// The widest instruction set that it can.
Isa best_isa() noexcept;

}  // namespace pocl
