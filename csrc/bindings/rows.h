// What the bindings of both row kernels share: the instruction set in use, and their common arguments. Addresses come from tensors that the
// caller keeps alive.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "dense/dense.h"

inline const std::pair<const char*, pocl::Isa> kIsas[] = {
    {"plain", pocl::Isa::plain}, {"avx2", pocl::Isa::avx2}, {"avx512", pocl::Isa::avx512}};

/// The instruction set to use: the widest there is, or the one that POCL_FAST_ISA names.
inline pocl::Isa chosen_isa() {
    const char* wanted = std::getenv("POCL_FAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return pocl::best_isa();
    for (const auto& [name, isa] : kIsas) {
        if (std::string(wanted) != name) continue;
        if (!pocl::supports(isa)) throw std::runtime_error("POCL_FAST_ISA=" + std::string(wanted) + ": this processor cannot run it");
        return isa;
    }
    throw std::runtime_error("POCL_FAST_ISA must be plain, avx2 or avx512, got " + std::string(wanted));
}

inline pocl::Family family_of(const std::string& name) {
    for (const auto& [known, family] : pocl::kFamilies)
        if (name == known) return family;
    throw std::invalid_argument("no divergence named " + name);
}

inline void require_labels_within(const std::int64_t* labels, std::int64_t N, std::int64_t ignore_index, std::int64_t V) {
    for (std::int64_t n = 0; n < N; ++n) {
        if (labels[n] == ignore_index || (labels[n] >= 0 && labels[n] < V)) continue;
        throw std::invalid_argument("label " + std::to_string(labels[n]) + " at token " + std::to_string(n) +
                                    " is outside the student's vocabulary of " + std::to_string(V));
    }
}

/// Whether what both row kernels are given is of the student's rows.
inline bool rows_fit(const pocl::Matrix& student, const std::optional<pocl::Matrix>& gradient, std::initializer_list<std::int64_t> values) {
    const std::int64_t N = student.rows;
    return std::ranges::all_of(values, [=](std::int64_t count) { return count == 1 || count == N; }) &&
           (!gradient || (gradient->rows == N && gradient->columns == student.columns && gradient->dtype == student.dtype));
}

inline pocl::PerRow per_row(std::uintptr_t address, std::int64_t count) {
    return {reinterpret_cast<const float*>(address), count == 1 ? 0 : 1};
}
