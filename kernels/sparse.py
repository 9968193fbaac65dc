"""Logits and K entries of the teacher in, losses and gradient out: the Triton side of `pocl_fast/loss/row_operator.py`.

One program a row, two passes over the student's logits in tiles: normalisers and gradient. The listed entries are left
out of the first, so that the mass of the rest is a sum of its own and not a difference, in which a confident student's
would drown; in the second they are written last. What is computed is `pocl_fast/loss/reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pocl_fast.kernels import tiles
from pocl_fast.kernels.arithmetic import FILL, FLOOR, LOG2E, transformed
from pocl_fast.kernels.divergence import FAMILIES
from pocl_fast.kernels.outcomes import LOG2E64, compare, log_sum, maximum, natural_log, rest_log_weight
from pocl_fast.kernels.passes import prepare
from pocl_fast.loss.arguments import IDENTITY, Settings, Tokens
from pocl_fast.loss.teacher_output import MOST_MASS

MAX_K = 1024  # entries a row: they are one block, in registers
MOST = tl.constexpr(MOST_MASS)


@triton.jit
def _rest_normalisers(
    student_row, listed_row, V, K, k, apart, s_scale, s_softcap,
    HAS_TRANSFORM: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums over what is not listed: maximum, shift, Σ 2^x and Σ 2^x · x for x = s · k - shift, CE's shift and Σ; online
    and a lane each, then of all lanes. A listed entry becomes FILL when its tile comes: `listed_row` is sorted."""
    BLOCK_V: tl.constexpr = LANES * VEC
    lanes = tiles.offsets(LANES, VEC)
    m = tl.full([LANES], FLOOR, tl.float32)
    S, S_ce = m * k, m * LOG2E
    z = tl.zeros([LANES], tl.float32)
    z_ce, x_sum = z, z
    at = 0
    entry = tl.load(listed_row)
    s_next = tiles.load_tile(student_row, 0, lanes, V, BLOCK_V, RAGGED, "evict_last")
    for v in range(0, V, BLOCK_V):
        s, _ = prepare(s_next, v, lanes, V, s_scale, s_softcap, BLOCK_V, HAS_TRANSFORM)
        s_next = tiles.load_tile(student_row, v + BLOCK_V, lanes, V, BLOCK_V, RAGGED, "evict_last")
        s = tl.where(s < FILL, FILL, s)  # −inf too; not maximum: that would lose a NaN
        while entry < v + BLOCK_V:
            s = tl.where(lanes == entry - v, FILL, s)
            at += 1
            entry = tl.load(listed_row + at, mask=at < K, other=2147483647)
        m = tl.maximum(m, tl.max(s, 1))
        S_new = m * k
        x = tl.fma(s, k, -S_new[:, None])
        q = tl.exp2(x)
        dx = S - S_new
        r = tl.exp2(dx)
        x_sum = (x_sum + z * dx) * r + tl.sum(q * x, 1)
        z = z * r + tl.sum(q, 1)
        S = S_new
        if apart:
            S_ce_new = m * LOG2E
            z_ce = z_ce * tl.exp2(S_ce - S_ce_new) + tl.sum(tl.exp2(tl.fma(s, LOG2E, -S_ce_new[:, None])), 1)
            S_ce = S_ce_new
    if not apart:
        S_ce, z_ce = S, z
    top, top_ce = tl.max(S, 0), tl.max(S_ce, 0)
    r = tl.exp2(S - top)
    x_sum = tl.sum((x_sum + z * (S - top)) * r, 0)
    return tl.max(m, 0), top, tl.sum(z * r, 0), x_sum, top_ce, tl.sum(z_ce * tl.exp2(S_ce - top_ce), 0)


@triton.jit
def _rest_gradient(
    student_row, grad_row, V, k, S, S_ce, weight_q, weight_ce, apart, s_scale, s_softcap,
    HAS_TRANSFORM: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Writes weight_q · 2^(s · k - S) + weight_ce · 2^(s · log2 e - S_ce) over the whole row, from its last tile to its
    first: the other pass ended there. It may lie over the student's logits, as the dense kernel's."""
    BLOCK_V: tl.constexpr = LANES * VEC
    lanes = tiles.offsets(LANES, VEC)
    if not apart:
        weight_q += weight_ce
    own = apart & (weight_ce != 0)
    last = (V - 1) // BLOCK_V * BLOCK_V
    s_next = tiles.load_tile(student_row, last, lanes, V, BLOCK_V, RAGGED, "evict_first")
    for done in range(0, V, BLOCK_V):
        v = last - done
        s, ds = prepare(s_next, v, lanes, V, s_scale, s_softcap, BLOCK_V, HAS_TRANSFORM)
        s_next = tiles.load_tile(student_row, v - BLOCK_V, lanes, V, BLOCK_V, RAGGED, "evict_first")
        grad = tl.zeros([LANES, VEC], tl.float32)
        if weight_q != 0:
            grad = weight_q * tl.exp2(tl.fma(s, k, -S))
        if own:
            grad += weight_ce * tl.exp2(tl.fma(s, LOG2E, -S_ce))
        if HAS_TRANSFORM:
            grad = grad * ds
        tiles.store_tile(grad_row, v, lanes, grad, V, BLOCK_V, RAGGED)


def _sparse_rows_kernel(
    student_ptr, log_probs_ptr, indices_ptr, listed_ptr, labels_ptr,  # [N, V], [N, K] three times, [N]
    temperature_ptr, alpha_ptr, row_scale_ptr,     # [1] or [N] (stride 0 or 1)
    stats_ptr, grad_ptr,                           # [8, N], [N, V]
    N, V, K,
    student_stride_n, grad_stride_n, temperature_stride_n, alpha_stride_n, row_scale_stride_n,
    ignore_index,
    share,                                         # the teacher's, of the mixture
    s_scale, s_softcap,                            # softcap 0: none
    FAMILY: tl.constexpr, BUCKET: tl.constexpr, POWER: tl.constexpr, NEEDS_GRAD: tl.constexpr,
    HAS_TRANSFORM: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token: its seven stats, row_scale · loss, and row_scale · d loss / d student."""
    n = tl.program_id(0).to(tl.int64)  # 64 bits: n * stride passes 2**31 at 14k tokens x 152k entries
    label = tl.load(labels_ptr + n).to(tl.int64)
    grad_row = grad_ptr + n * grad_stride_n
    if label == ignore_index:
        tiles.store_zeros(stats_ptr + n, N, grad_row, V, NEEDS_GRAD, RAGGED, LANES, VEC)
        return
    tl.device_assert((label >= 0) & (label < V), "label outside the student's vocabulary")  # with TRITON_DEBUG=1
    student_row = student_ptr + n * student_stride_n
    tau = tl.load(temperature_ptr + n * temperature_stride_n)
    alpha = tl.load(alpha_ptr + n * alpha_stride_n)
    row_scale = tl.load(row_scale_ptr + n * row_scale_stride_n)
    tau64, alpha64 = tau.to(tl.float64), alpha.to(tl.float64)
    k = (1.0 / tau) * LOG2E
    apart = tau != 1.0

    # the listed entries; one that is not there has a log-probability of −inf
    entries = tl.arange(0, BLOCK_K)
    log_p = tl.load(log_probs_ptr + n * K + entries, mask=entries < K, other=-float("inf")).to(tl.float32)
    place = tl.load(indices_ptr + n * K + entries, mask=entries < K, other=0).to(tl.int64)
    present = log_p != -float("inf")
    tl.device_assert((present == 0) | ((place >= 0) & (place < V)), "an entry of the teacher outside the vocabulary")
    s = tl.load(student_row + place, mask=present, other=-float("inf")).to(tl.float32)
    s_label = tl.load(student_row + label).to(tl.float32)
    ds = tl.zeros_like(s) + 1.0
    ds_label = 1.0
    if HAS_TRANSFORM:
        s, ds = transformed(s, s_scale, s_softcap)
        s_label, ds_label = transformed(s_label, s_scale, s_softcap)
    inside = s != -float("inf")

    m, S, z, x_sum, S_ce, z_ce = _rest_normalisers(
        student_row, listed_ptr + n * K, V, K, k, apart, s_scale, s_softcap, HAS_TRANSFORM, RAGGED, LANES, VEC
    )
    # natural logarithms in fp64; what 2^0 became in either sum, for the shifts are rounded, is divided out
    has_rest = z != 0
    m64 = m.to(tl.float64)
    log_z_rest = natural_log(tl.where(has_rest, z, 1.0)) - tl.fma(m, k, -S).to(tl.float64) / LOG2E64
    log_z_ce_rest = natural_log(tl.where(z_ce != 0, z_ce, 1.0)) - tl.fma(m, LOG2E, -S_ce).to(tl.float64) / LOG2E64
    rest, rest_ce = m64 / tau64 + log_z_rest, m64 + log_z_ce_rest
    s64 = s.to(tl.float64)
    x, y = s64 / tau64, log_p.to(tl.float64) / tau64
    largest = tl.maximum(m, tl.max(s, 0))
    top, top_ce = maximum(x, inside, rest, has_rest), maximum(s64, inside, rest_ce, has_rest)
    log_z = top + log_sum(top, x, inside, rest, has_rest)
    log_z_ce = top_ce + log_sum(top_ce, s64, inside, rest_ce, has_rest)
    empty = (tl.max(inside.to(tl.int32), 0) == 0) & (has_rest == 0)  # the student's row is all −inf
    mean_x = tl.sum(tl.where(inside, tl.exp(x - log_z) * x, 0.0), 0)
    rest_share = tl.where(has_rest, tl.exp(rest - log_z), 0.0)
    # Σ 2^x · x is relative to S: of x from m / tau on
    x_rest = m64 / tau64 + (x_sum / tl.where(has_rest, z, 1.0) - tl.fma(m, k, -S)).to(tl.float64) / LOG2E64
    student_entropy = log_z - mean_x - tl.where(has_rest, rest_share * x_rest, 0.0)

    # the outcomes of D: the listed entries, and the rest
    listed_mass = tl.sum(tl.where(present, tl.exp(log_p.to(tl.float64)), 0.0), 0)
    tl.device_assert((listed_mass > MOST) == 0, "the teacher's log-probabilities have a mass above 1")
    y = tl.where(listed_mass > MOST, float("nan"), y)
    others = V - tl.sum(present.to(tl.int32), 0)
    rest_in_p, y_rest = rest_log_weight(listed_mass, others, others > V - K, tau64)
    D, teacher_entropy, g, g_rest = compare(
        x, y, inside, present, rest, y_rest, has_rest & BUCKET, rest_in_p & BUCKET, share, FAMILY
    )
    best = tl.max(log_p, 0)
    agree = tl.max((inside & (log_p == best) & (s == largest)).to(tl.float32), 0)

    c = 1.0
    for _ in tl.static_range(POWER):
        c = c * tau
    ce = log_z_ce - s_label.to(tl.float64)
    ce = tl.where(empty | (s_label == -float("inf")), float("inf"), ce)
    weighted_ce = tl.where((alpha == 0) & (ce == ce), 0.0, alpha64 * ce)
    loss = (weighted_ce + (1 - alpha64) * c * D).to(tl.float32)
    tl.store(stats_ptr + n, loss)
    tl.store(stats_ptr + N + n, ce.to(tl.float32))
    tl.store(stats_ptr + 2 * N + n, D.to(tl.float32))
    tl.store(stats_ptr + 3 * N + n, tl.where(empty, 0.0, student_entropy).to(tl.float32))
    tl.store(stats_ptr + 4 * N + n, teacher_entropy.to(tl.float32))
    tl.store(stats_ptr + 5 * N + n, tl.where((s_label == largest) & (empty == 0), 1.0, 0.0))
    tl.store(stats_ptr + 6 * N + n, agree)
    tl.store(stats_ptr + 7 * N + n, row_scale * loss)
    if NEEDS_GRAD:
        row_scale = row_scale.to(tl.float64)
        weight_d = row_scale * (1 - alpha64) * c / tau64
        weight_ce = tl.where(empty, 0.0, row_scale * alpha64)
        weight_q = tl.where(has_rest, weight_d * g_rest / z, 0.0).to(tl.float32)
        weight_ce_rest = weight_ce * tl.where(has_rest, tl.exp(rest_ce - log_z_ce) / z_ce, 0.0)
        _rest_gradient(
            student_row, grad_row, V, k, S, S_ce, weight_q, weight_ce_rest.to(tl.float32), apart,
            s_scale, s_softcap, HAS_TRANSFORM, RAGGED, LANES, VEC,
        )  # fmt: skip
        tl.debug_barrier()  # what follows lies over what other threads have written
        is_label = place == label
        of_label = weight_ce * (tl.exp(-ce) - 1.0)
        g = weight_d * g + tl.where(is_label, of_label, weight_ce * tl.where(inside, tl.exp(s64 - log_z_ce), 0.0))
        dtype = grad_ptr.dtype.element_ty
        tl.store(grad_row + place, (g.to(tl.float32) * ds).to(dtype), mask=present)
        g_label = weight_q * tl.exp2(tl.fma(s_label, k, -S)) + of_label.to(tl.float32)
        listed = tl.max((is_label & present).to(tl.int32), 0) != 0
        tl.store(grad_row + label, (g_label * ds_label).to(dtype), mask=(listed == 0) & (weight_ce != 0))


# what a new value of must not compile again; pointers to scalars have no alignment that matters
_sparse_rows_kernel = triton.jit(
    _sparse_rows_kernel,
    do_not_specialize=["N", "K", "ignore_index", "temperature_stride_n", "alpha_stride_n", "row_scale_stride_n"],
    do_not_specialize_on_alignment=[
        "log_probs_ptr", "indices_ptr", "listed_ptr", "labels_ptr", "temperature_ptr", "alpha_ptr", "row_scale_ptr",
        "stats_ptr",
    ],
)  # fmt: skip


def sparse_distillation_rows(
    student: torch.Tensor,  # [N, V] fp32, bf16 or fp16; rows may be strided
    log_probs: torch.Tensor,  # [N, K], its own dtype; −inf: no entry
    indices: torch.Tensor,  # [N, K] int32 or int64, distinct in a row
    tokens: Tokens,
    settings: Settings,
    *,
    needs_grad: bool,
    reduced: bool,
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dense.distillation_rows`, the teacher being K entries a row; `settings.tail` says what becomes of the others.
    Raises ValueError where K is above 1024."""
    N, V = student.shape
    K = log_probs.shape[1]
    if K > MAX_K:
        raise ValueError(f"the Triton kernel takes at most {MAX_K} entries of the teacher a token, got {K}")
    stats, grad = tiles.outputs(student, needs_grad, grad)
    if N == 0:
        return *tiles.loss_and_stats(stats, reduced), grad
    log_probs, indices = log_probs.contiguous(), indices.contiguous()
    listed = torch.where(log_probs == -torch.inf, V, indices).to(torch.int32).sort(1).values
    itemsize = student.element_size()
    tile = tiles.choose_tile(settings.divergence, V, itemsize, itemsize, tiles.capability_of(student.device))
    transform = settings.transforms[:2]  # log-probabilities have none
    _sparse_rows_kernel[(N,)](
        student, log_probs, indices, listed, *tokens, stats, grad,
        N, V, K, student.stride(0), grad.stride(0),
        *(int(value.numel() > 1) for value in tokens[1:]), settings.ignore_index, settings.teacher_share, *transform,
        FAMILY=FAMILIES[settings.divergence], BUCKET=settings.tail == "bucket", POWER=settings.temperature_power,
        NEEDS_GRAD=needs_grad, HAS_TRANSFORM=transform != IDENTITY, RAGGED=bool(V % 16),
        LANES=tile.lanes, VEC=tile.vec,
        BLOCK_K=max(32, triton.next_power_of_2(K)), num_warps=tile.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return *tiles.loss_and_stats(stats, reduced), grad
