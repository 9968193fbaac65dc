"""Logits in, losses, metrics and gradient out, one launch: the Triton side of `pocl_fast/loss/row_operator.py`.

One program a row, two passes over it in tiles for a KL and three for the other divergences: normalisers, D, gradient.
What is computed is `pocl_fast/loss/reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pocl_fast.kernels import tiles
from pocl_fast.kernels.arithmetic import FLOOR, LN2, LOG2E, transformed
from pocl_fast.kernels.divergence import FAMILIES, FORWARD_KL, REVERSE_KL, relative_size
from pocl_fast.kernels.passes import gradient, measure, normalisers
from pocl_fast.loss.arguments import IDENTITY, Settings, Tokens

CLOSE = tl.constexpr(0.01)  # nats of D below which it is summed term by term


def _rows_kernel(
    student_ptr, teacher_ptr, labels_ptr,          # [N, V_S], [N, V_T], [N]
    temperature_ptr, alpha_ptr, row_scale_ptr,     # [1] or [N] (stride 0 or 1)
    stats_ptr, grad_ptr,                           # [8, N], [N, V_S]
    N, V_S, V,                                     # V: the shared vocabulary
    student_stride_n, teacher_stride_n, grad_stride_n, temperature_stride_n, alpha_stride_n, row_scale_stride_n,
    ignore_index,
    share,                                         # the teacher's, of the mixture
    s_scale, s_softcap, t_scale, t_softcap,        # softcap 0: none
    FAMILY: tl.constexpr, POWER: tl.constexpr, NEEDS_GRAD: tl.constexpr, HAS_TRANSFORM: tl.constexpr,
    RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token: its seven stats, row_scale · loss, and row_scale · d loss / d student."""
    KL: tl.constexpr = (FAMILY == FORWARD_KL) | (FAMILY == REVERSE_KL)
    n = tl.program_id(0).to(tl.int64)  # 64 bits: n * stride passes 2**31 at 14k tokens x 152k entries
    label = tl.load(labels_ptr + n).to(tl.int64)
    grad_row = grad_ptr + n * grad_stride_n
    if label == ignore_index:
        tiles.store_zeros(stats_ptr + n, N, grad_row, V_S, NEEDS_GRAD, RAGGED, LANES, VEC)
        return
    tl.device_assert((label >= 0) & (label < V_S), "label outside the student's vocabulary")  # with TRITON_DEBUG=1
    student_row = student_ptr + n * student_stride_n
    teacher_row = teacher_ptr + n * teacher_stride_n
    tau = tl.load(temperature_ptr + n * temperature_stride_n)
    alpha = tl.load(alpha_ptr + n * alpha_stride_n)
    row_scale = tl.load(row_scale_ptr + n * row_scale_stride_n)
    k = (1.0 / tau) * LOG2E  # logits to base-2 exponents at temperature tau
    s_label = tl.load(student_row + label).to(tl.float32)
    if HAS_TRANSFORM:
        s_label, _ = transformed(s_label, s_scale, s_softcap)

    apart = tau != 1.0
    m_ce, S_ce, z_ce, S_q, z_q, x_sum, S_p, z_p, y_sum, gap_sum, agree, no_q, no_p, kept, lost = normalisers(
        student_row, teacher_row, V_S, V, k, apart, s_scale, s_softcap, t_scale, t_softcap,
        FAMILY, False, NEEDS_GRAD, HAS_TRANSFORM, RAGGED, LANES, VEC, STAGES,
    )  # fmt: skip
    careful = (x_sum != x_sum) | (y_sum != y_sum)
    if careful:
        apart = True
        m_ce, S_ce, z_ce, S_q, z_q, x_sum, S_p, z_p, y_sum, gap_sum, agree, no_q, no_p, kept, lost = normalisers(
            student_row, teacher_row, V_S, V, k, apart, s_scale, s_softcap, t_scale, t_softcap,
            FAMILY, True, NEEDS_GRAD, HAS_TRANSFORM, RAGGED, LANES, VEC, STAGES,
        )  # fmt: skip
    # of one entry p = q = 1: no D, whatever the rounding of log2(p / q)
    single = (V == 1) & (x_sum == x_sum) & (y_sum == y_sum)
    log2_z_q, log2_z_p = tl.log2(z_q), tl.log2(z_p)
    # all but D, written here: no register holds it through the next pass
    largest = tl.exp2(tl.fma(m_ce, LOG2E, -S_ce))  # what 1 became, for S_ce is rounded
    empty = m_ce == FLOOR  # the student's row is all −inf: nothing can lower its CE
    ce = (m_ce - s_label) + tl.log2(z_ce / largest) * LN2
    ce = tl.where(empty & (z_ce == z_ce), float("inf"), ce)
    tl.store(stats_ptr + N + n, ce)
    tl.store(stats_ptr + 3 * N + n, tl.where(no_q | single, 0.0, (log2_z_q - x_sum / z_q) * LN2))
    tl.store(stats_ptr + 4 * N + n, tl.where(no_p | single, 0.0, (log2_z_p - y_sum / z_p) * LN2))
    tl.store(stats_ptr + 5 * N + n, tl.where((s_label == m_ce) & (empty == 0), 1.0, 0.0))
    tl.store(stats_ptr + 6 * N + n, agree.to(tl.float32))
    G = (S_p - S_q) + tl.log2(z_p / z_q)  # of all entries: log2(p / q) = (t - s) · k - G
    nothing = no_q | no_p | single
    if KL:
        nothing = nothing | (kept == 0)  # no term of D is finite
    nothing = nothing & (G == G)  # a NaN shows whatever the other side is
    if FAMILY == REVERSE_KL:
        d = (G * kept - k * (gap_sum / z_q)) * LN2
    else:
        d = (k * (gap_sum / z_p) - G * kept) * LN2
    # D so small, or an offset between the models so large, that this difference of two sums has lost digits
    close = d * relative_size(share, FAMILY) < 0.1 * tl.maximum(tl.abs(G) - 16.0, 0.0) + CLOSE
    mean_u = d
    if FAMILY == REVERSE_KL:
        mean_u = d - lost  # −1 where the term is left out
    # the sum of kl_term - D: where the term is left out there is neither it nor -p + q, or in its place (e - 2) q
    excess = lost * 1.7182818 if FAMILY == REVERSE_KL else lost
    if not KL:
        d, mean_u = measure(
            student_row, teacher_row, V, k, S_q, log2_z_q, S_p, log2_z_p, G, share, careful, close,
            s_scale, s_softcap, t_scale, t_softcap,
            FAMILY, HAS_TRANSFORM, RAGGED, LANES, VEC, STAGES, "evict_last" if NEEDS_GRAD else "evict_first",
        )  # fmt: skip
    elif not NEEDS_GRAD:  # noqa: SIM102 (the outer is decided when compiling, the inner is data)
        if close:
            d, _ = measure(
                student_row, teacher_row, V, k, S_q, log2_z_q, S_p, log2_z_p, G, share, careful, close,
                s_scale, s_softcap, t_scale, t_softcap,
                FAMILY, HAS_TRANSFORM, RAGGED, LANES, VEC, STAGES, "evict_first",
            )  # fmt: skip
            d -= excess

    c = 1.0
    for _ in tl.static_range(POWER):
        c = c * tau
    if NEEDS_GRAD:
        weight_d = tl.where(nothing, 0.0, row_scale * (1 - alpha) * c / tau)
        weight_ce = tl.where(empty | (V_S == 1), 0.0, row_scale * alpha)
        terms = gradient(
            student_row, teacher_row, grad_row, V_S, V, k, label,
            S_q, z_q, S_p, z_p, G, S_ce, z_ce, mean_u, kept, weight_d, weight_ce, share, apart, careful, close,
            s_scale, s_softcap, t_scale, t_softcap, FAMILY, HAS_TRANSFORM, RAGGED, LANES, VEC, STAGES,
        )  # fmt: skip
        if KL:
            d = tl.where(close, terms - excess, d)
    d = tl.where(nothing, 0.0, d)
    weighted_ce = tl.where((alpha == 0) & (ce == ce), 0.0, alpha * ce)
    loss = weighted_ce + (1 - alpha) * c * d
    tl.store(stats_ptr + n, loss)
    tl.store(stats_ptr + 2 * N + n, d)
    tl.store(stats_ptr + 7 * N + n, row_scale * loss)


# what a new value of must not compile again; pointers to scalars have no alignment that matters
_rows_kernel = triton.jit(
    _rows_kernel,
    do_not_specialize=["N", "ignore_index", "temperature_stride_n", "alpha_stride_n", "row_scale_stride_n"],
    do_not_specialize_on_alignment=["labels_ptr", "temperature_ptr", "alpha_ptr", "row_scale_ptr", "stats_ptr"],
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


_scale_rows_kernel = triton.jit(
    _scale_rows_kernel.fn,
    do_not_specialize=["upstream_stride_n"],
    do_not_specialize_on_alignment=["upstream_ptr"],
)


def distillation_rows(
    student: torch.Tensor,  # [N, V_s] fp32, bf16 or fp16; rows may be strided
    teacher: torch.Tensor,  # [N, V_t], its own dtype
    tokens: Tokens,
    settings: Settings,
    *,
    needs_grad: bool,
    reduced: bool,
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the scaled losses, [] fp32, or where not `reduced` each row's, [N]; stats [7, N] fp32; and the
    gradient [N, V_s] in the student's dtype, or [0]. The gradient is written to `grad` where that is given: of the
    student's shape and dtype, rows may be strided; it may be `student` itself."""
    N, V_S = student.shape
    V = min(V_S, teacher.shape[1])
    stats, grad = tiles.outputs(student, needs_grad, grad)
    if N == 0:
        return *tiles.loss_and_stats(stats, reduced), grad
    capability = tiles.capability_of(student.device)
    tile = tiles.choose_tile(settings.divergence, V_S, student.element_size(), teacher.element_size(), capability)
    _rows_kernel[(N,)](
        student, teacher, *tokens, stats, grad,
        N, V_S, V, student.stride(0), teacher.stride(0), grad.stride(0),
        *(int(value.numel() > 1) for value in tokens[1:]), settings.ignore_index, settings.teacher_share,
        *settings.transforms,
        FAMILY=FAMILIES[settings.divergence], POWER=settings.temperature_power, NEEDS_GRAD=needs_grad,
        HAS_TRANSFORM=settings.transforms != IDENTITY * 2, RAGGED=bool(V % 16 or V_S % 16),
        LANES=tile.lanes, VEC=tile.vec, STAGES=tile.stages, num_warps=tile.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return *tiles.loss_and_stats(stats, reduced), grad


def scale_rows_(grad: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiplies `grad` [N, V] in place by `upstream` [1] or [N]; touches no row whose factor is 1."""
    N, V = grad.shape
    if N == 0:
        return
    BLOCK_V = min(4096, max(128, triton.next_power_of_2(V)))
    grid = (N, triton.cdiv(V, BLOCK_V))
    _scale_rows_kernel[grid](
        grad, upstream, V, grad.stride(0), int(upstream.numel() > 1), BLOCK_V=BLOCK_V, num_warps=max(1, BLOCK_V // 512)
    )
