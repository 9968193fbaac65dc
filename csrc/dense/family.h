// The divergences that both row kernels compute. docs/adding-a-divergence.md lists what a new one needs. No Python, no torch.
#pragma once

namespace pocl {

enum class Family { forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd };

struct NamedFamily {
    const char* name;
    Family family;
};

/// Every one, by its name in Python.
constexpr NamedFamily kFamilies[] = {
    {"forward_kl", Family::forward_kl},           {"reverse_kl", Family::reverse_kl},           {"jsd", Family::jsd},
    {"skew_forward_kl", Family::skew_forward_kl}, {"skew_reverse_kl", Family::skew_reverse_kl}, {"tvd", Family::tvd},
};
constexpr int kFamilyCount = sizeof kFamilies / sizeof kFamilies[0];

constexpr bool is_kl(Family family) { return family == Family::forward_kl || family == Family::reverse_kl; }

/// The rows of `stats`, of which there is a number a token: loss, ce, divergence, student and teacher entropy, accuracy, agreement. They are
/// the fields of `Rows` in pocl_fast/loss/reference.py.
constexpr int kStats = 7;

}  // namespace pocl
