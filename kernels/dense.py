"""Logits in, losses, metrics and gradient out, one launch: the Triton side of `pocl_fast/ops.py`.

One program a row, two passes over it in tiles. The first finds every normaliser online, and D with them; the second, in
reverse order so that it starts on what the caches still hold, writes the gradient. What is computed is
`pocl_fast/reference.py`.
"""

import torch
import triton
import triton.language as tl

from pocl_fast.kernels.divergence import FAMILIES, LOG2E, divergence, gradient, moment, moment_shift

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(row, offs, limit):
    """A tile of a row in fp32; −inf past its end."""
    return tl.load(row + offs, mask=offs < limit, other=-float("inf")).to(tl.float32)


@triton.jit
def _finite(m):
    """A maximum to subtract: 0 while nothing was seen, so that −inf − m stays −inf and does not become NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _rows_kernel(
    student_ptr, teacher_ptr, labels_ptr,          # [N, V_S], [N, V_T], [N]
    temperature_ptr, alpha_ptr, row_scale_ptr,     # [1] or [N] (stride 0 or 1), [N]
    stats_ptr, grad_ptr,                           # [7, N], [N, V_S]
    N, V_S, V,                                     # V: the shared vocabulary
    student_stride_n, teacher_stride_n, grad_stride_n, temperature_stride_n, alpha_stride_n, ignore_index,
    FAMILY: tl.constexpr, POWER: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token: its seven stats, and row_scale · d loss / d student."""
    n = tl.program_id(0).to(tl.int64)  # 64 bits: n * stride passes 2**31 at 14k tokens x 152k entries
    label = tl.load(labels_ptr + n).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    grad_row = grad_ptr + n * grad_stride_n
    if label == ignore_index:
        for k in tl.static_range(7):
            tl.store(stats_ptr + k * N + n, 0.0)
        if NEEDS_GRAD:
            for v in range(0, V_S, BLOCK_V):
                offs = v + lanes
                tl.store(grad_row + offs, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=offs < V_S)
        return
    student_row = student_ptr + n * student_stride_n
    teacher_row = teacher_ptr + n * teacher_stride_n
    tau = tl.load(temperature_ptr + n * temperature_stride_n)
    alpha = tl.load(alpha_ptr + n * alpha_stride_n)
    scale = (1.0 / tau) * LOG2E  # logits to base-2 exponents at temperature tau

    # pass 1: running maxima (m), normalisers (z) and moments, all online
    m_ce, m_s, m_t = -float("inf"), -float("inf"), -float("inf")
    z_ce, z_q, z_p = 0.0, 0.0, 0.0
    moment_sum, x_sum, y_sum = 0.0, 0.0, 0.0
    agree = 0
    for v in range(0, V, BLOCK_V):
        offs = v + lanes
        s = _load(student_row, offs, V)
        t = _load(teacher_row, offs, V)
        m_ce_new = tl.maximum(m_ce, tl.max(s, 0))
        z_ce = z_ce * tl.exp2((m_ce - _finite(m_ce_new)) * LOG2E) + tl.sum(tl.exp2((s - _finite(m_ce_new)) * LOG2E), 0)
        m_ce = m_ce_new
        out = (s == -float("inf")) | (t == -float("inf"))
        s = tl.where(out, -float("inf"), s)
        t = tl.where(out, -float("inf"), t)
        m_s_new = tl.maximum(m_s, tl.max(s, 0))
        m_t_new = tl.maximum(m_t, tl.max(t, 0))
        x = (s - _finite(m_s_new)) * scale
        y = (t - _finite(m_t_new)) * scale
        q, p = tl.exp2(x), tl.exp2(y)
        # what was summed relative to the old maxima, moved to the new ones; 0 where nothing was summed yet
        dx = tl.where(m_s == -float("inf"), 0.0, (m_s - m_s_new) * scale)
        dy = tl.where(m_t == -float("inf"), 0.0, (m_t - m_t_new) * scale)
        r_q, r_p = tl.exp2(dx), tl.exp2(dy)
        moment_sum += moment_shift(z_q, z_p, dx, dy, FAMILY)
        moment_sum = moment_sum * (r_p if FAMILY == 0 else r_q) + tl.sum(moment(q, p, x, y, out, FAMILY), 0)
        x_sum = (x_sum + z_q * dx) * r_q + tl.sum(tl.where(out, 0.0, q * x), 0)
        y_sum = (y_sum + z_p * dy) * r_p + tl.sum(tl.where(out, 0.0, p * y), 0)
        z_q = z_q * r_q + tl.sum(q, 0)
        z_p = z_p * r_p + tl.sum(p, 0)
        here = tl.max((~out & (s == m_s_new) & (t == m_t_new)).to(tl.int32), 0)
        agree = tl.where((m_s_new == m_s) & (m_t_new == m_t), agree | here, here)
        m_s, m_t = m_s_new, m_t_new
    for v in range(V, V_S, BLOCK_V):  # entries that only the student has: CE alone
        s = _load(student_row, v + lanes, V_S)
        m_ce_new = tl.maximum(m_ce, tl.max(s, 0))
        z_ce = z_ce * tl.exp2((m_ce - _finite(m_ce_new)) * LOG2E) + tl.sum(tl.exp2((s - _finite(m_ce_new)) * LOG2E), 0)
        m_ce = m_ce_new

    nothing = (m_s == -float("inf")) | (m_t == -float("inf"))  # no entry is left to D
    z_q = tl.where(nothing, 1.0, z_q)
    z_p = tl.where(nothing, 1.0, z_p)
    d = divergence(moment_sum, z_q, z_p, FAMILY)
    s_label = tl.load(student_row + label).to(tl.float32)
    ce = m_ce + tl.log2(z_ce) * LN2 - s_label
    c = 1.0
    for _ in tl.static_range(POWER):
        c = c * tau
    weighted_ce = tl.where((alpha == 0) & (ce == ce), 0.0, alpha * ce)
    tl.store(stats_ptr + n, weighted_ce + (1 - alpha) * c * d)
    tl.store(stats_ptr + N + n, ce)
    tl.store(stats_ptr + 2 * N + n, d)
    tl.store(stats_ptr + 3 * N + n, (tl.log2(z_q) - x_sum / z_q) * LN2)
    tl.store(stats_ptr + 4 * N + n, (tl.log2(z_p) - y_sum / z_p) * LN2)
    tl.store(stats_ptr + 5 * N + n, tl.where(s_label == m_ce, 1.0, 0.0))
    tl.store(stats_ptr + 6 * N + n, tl.where(nothing, 0.0, agree.to(tl.float32)))

    if NEEDS_GRAD:
        row_scale = tl.load(row_scale_ptr + n)
        weight_d = row_scale * (1 - alpha) * c / tau
        weight_ce = row_scale * alpha
        inv_z_q, inv_z_p, log2_gap = 1.0 / z_q, 1.0 / z_p, tl.log2(z_p / z_q)
        inv_z_ce = weight_ce / z_ce
        for v in range(V, V_S, BLOCK_V):
            offs = v + lanes
            s = _load(student_row, offs, V_S)
            g = inv_z_ce * tl.exp2((s - _finite(m_ce)) * LOG2E) - tl.where(offs == label, weight_ce, 0.0)
            g = tl.where(weight_ce == 0, 0.0, g)
            tl.store(grad_row + offs, g.to(grad_ptr.dtype.element_ty), mask=offs < V_S)
        tiles = tl.cdiv(V, BLOCK_V)
        for i in range(0, tiles):
            offs = (tiles - 1 - i) * BLOCK_V + lanes
            s = _load(student_row, offs, V)
            t = _load(teacher_row, offs, V)
            out = (s == -float("inf")) | (t == -float("inf"))
            x = (tl.where(out, -float("inf"), s) - _finite(m_s)) * scale
            y = (tl.where(out, -float("inf"), t) - _finite(m_t)) * scale
            q, p = tl.exp2(x) * inv_z_q, tl.exp2(y) * inv_z_p
            g = weight_d * gradient(q, p, x + log2_gap, y, out, d, FAMILY)
            if weight_ce != 0:
                g += inv_z_ce * tl.exp2((s - _finite(m_ce)) * LOG2E) - tl.where(offs == label, weight_ce, 0.0)
            tl.store(grad_row + offs, g.to(grad_ptr.dtype.element_ty), mask=offs < V)


_rows_kernel = triton.jit(
    _rows_kernel.fn, do_not_specialize=["N", "ignore_index", "temperature_stride_n", "alpha_stride_n"]
)


@triton.jit
def _scale_rows_kernel(grad_ptr, upstream_ptr, V, grad_stride_n, upstream_stride_n, BLOCK_V: tl.constexpr):
    """One tile of one row times its factor; nothing is touched where that is 1."""
    n = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream_ptr + n * upstream_stride_n)
    if factor == 1.0:
        return
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = grad_ptr + n * grad_stride_n + offs
    g = tl.load(at, mask=offs < V, other=0.0).to(tl.float32) * factor
    tl.store(at, g.to(grad_ptr.dtype.element_ty), mask=offs < V)


def tile(V: int) -> tuple[int, int]:
    """BLOCK_V and warps for a vocabulary: tiles of at most 4096, so that 16 elements a thread stay in registers."""
    block = min(4096, max(128, triton.next_power_of_2(V)))
    return block, max(1, min(8, block // 512))


def distillation_rows(
    student: torch.Tensor,  # [N, V_s] fp32, bf16 or fp16; rows may be strided
    teacher: torch.Tensor,  # [N, V_t], its own dtype
    labels: torch.Tensor,  # [N] int32 or int64
    temperature: torch.Tensor,  # [1] or [N] fp32
    alpha: torch.Tensor,  # [1] or [N] fp32
    row_scale: torch.Tensor,  # [N] fp32
    *,
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stats [7, N] fp32 and the gradient [N, V_s] in the student's dtype, or [0]."""
    N, V_S = student.shape
    V = min(V_S, teacher.shape[1])
    stats = torch.empty((7, N), dtype=torch.float32, device=student.device)
    grad = torch.empty((N, V_S) if needs_grad else (0,), dtype=student.dtype, device=student.device)
    if N == 0:
        return stats, grad
    BLOCK_V, num_warps = tile(V_S)
    _rows_kernel[(N,)](
        student, teacher, labels, temperature, alpha, row_scale, stats, grad,
        N, V_S, V, student.stride(0), teacher.stride(0), V_S,
        int(temperature.numel() > 1), int(alpha.numel() > 1), ignore_index,
        FAMILY=FAMILIES[divergence], POWER=temperature_power, NEEDS_GRAD=needs_grad, BLOCK_V=BLOCK_V,
        num_warps=num_warps,
    )  # fmt: skip
    return stats, grad


def scale_rows_(grad: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiplies `grad` [N, V] in place by `upstream` [N]; touches no row whose factor is 1."""
    N, V = grad.shape
    if N == 0:
        return
    BLOCK_V, num_warps = tile(V)
    grid = (N, triton.cdiv(V, BLOCK_V))
    _scale_rows_kernel[grid](
        grad, upstream, V, grad.stride(0), upstream.stride(0), BLOCK_V=BLOCK_V, num_warps=num_warps
    )
