// The three products of a linear loss with its lm_head: bf16 in, fp32 out as it comes from the accumulators. No Python, no torch header.
#pragma once
#include "matrix/matrix.h"

namespace pocl {

/// Whether they can be computed here: the processor multiplies bf16, and the process holds a micro-kernel for it (see micro_kernel.h).
bool has_products() noexcept;

// hidden [n, H], weight [V, H] and grad [n, V] may be bf16 or fp32, which is rounded to bf16 (to nearest, ties to even). Every sum has one
// order, whatever the number of threads. They throw std::runtime_error where the micro-kernel fails, and need has_products().

/// out [n, V] fp32 = hidden · weightᵀ + bias; bias is [V] or null.
void logits_product(const Matrix& hidden, const Matrix& weight, const float* bias, const Matrix& out, int threads);

/// out [n, H] fp32 = grad · weight.
void hidden_grad_product(const Matrix& grad, const Matrix& weight, const Matrix& out, int threads);

/// total [V, H] fp32 = gradᵀ · hidden, or += where `add`.
void weight_grad_product(const Matrix& grad, const Matrix& hidden, const Matrix& total, bool add, int threads);

}  // namespace pocl
