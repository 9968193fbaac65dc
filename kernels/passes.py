"""The passes over one token's two rows of logits. Each reads ahead of the tile it works on: see `tiles.Tile.stages`.

Exponents are in base 2 and relative to a shift S = maximum · k, k = log2(e) / tau, rounded once and then used as it is:
x = s · k - S is one fused multiply-add, and S's rounding cancels between a sum and what is divided by it.
"""

import triton
import triton.language as tl

from pocl_fast.kernels.arithmetic import FILL, FLOOR, LN2, LOG2E, transformed
from pocl_fast.kernels.divergence import FORWARD_KL, REVERSE_KL, TVD, kl_term, mixture, slope, terms
from pocl_fast.kernels.tiles import load_tile, offsets, store_tile


@triton.jit
def prepare(x, v, lanes, V, scale, softcap, BLOCK_V: tl.constexpr, HAS_TRANSFORM: tl.constexpr):
    """A loaded tile as fp32 logits of the model, FILL past V; and their derivative by what was loaded."""
    x = x.to(tl.float32)
    dx = 1.0
    if HAS_TRANSFORM:
        x, dx = transformed(x, scale, softcap)
    if v + BLOCK_V > V:
        x = tl.where(v + lanes < V, x, FILL)
    return x, dx


@triton.jit
def _load_pair(
    student_row, teacher_row, v, lanes, V,
    BLOCK_V: tl.constexpr, RAGGED: tl.constexpr, STAGES: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Both rows' tiles at v as they are stored."""
    s = load_tile(student_row, v, lanes, V, BLOCK_V, RAGGED, POLICY, STAGES != 0)
    t = load_tile(teacher_row, v, lanes, V, BLOCK_V, RAGGED, POLICY, STAGES != 0)
    return s, t


@triton.jit
def _first_pair(
    student_row, teacher_row, v, lanes, V,
    BLOCK_V: tl.constexpr, RAGGED: tl.constexpr, STAGES: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """What a loop that starts at v has read ahead; numbers that nobody reads where that is the compiler's work."""
    if STAGES == 0:
        return _load_pair(student_row, teacher_row, v, lanes, V, BLOCK_V, RAGGED, STAGES, POLICY)
    else:
        return 0, 0


@triton.jit
def _next_pair(
    s_ahead, t_ahead, student_row, teacher_row, v, step, lanes, V, s_scale, s_softcap, t_scale, t_softcap,
    BLOCK_V: tl.constexpr, HAS_TRANSFORM: tl.constexpr, RAGGED: tl.constexpr, STAGES: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """The tiles at v, prepared: s, its derivative, t; and what is read ahead for the turn at v + step."""
    if STAGES == 0:
        s, t = s_ahead, t_ahead
    else:
        s, t = _load_pair(student_row, teacher_row, v, lanes, V, BLOCK_V, RAGGED, STAGES, POLICY)
    s, ds = prepare(s, v, lanes, V, s_scale, s_softcap, BLOCK_V, HAS_TRANSFORM)
    t, _ = prepare(t, v, lanes, V, t_scale, t_softcap, BLOCK_V, HAS_TRANSFORM)
    if STAGES == 0:
        s_ahead, t_ahead = _load_pair(student_row, teacher_row, v + step, lanes, V, BLOCK_V, RAGGED, STAGES, POLICY)
    return s, ds, t, s_ahead, t_ahead


@triton.jit
def filled(x):
    """Nothing below FILL, so that no product with 0 is NaN: −inf becomes a probability of 0. Keeps NaN."""
    return tl.where(x < FILL, FILL, x)


@triton.jit
def filled_pair(s, t, k, G, FAMILY: tl.constexpr):
    """Both sides filled. Where a KL's term would be infinite, with a teacher's logit that leaves it out: p = 0 for the
    forward KL, and for the reverse KL p = e · q, so that u = log(q / p) is −1, as if D had no such term."""
    s_filled = filled(s)
    if FAMILY == FORWARD_KL:
        t = tl.where(s == -float("inf"), FILL, t)
    if FAMILY == REVERSE_KL:
        return s_filled, tl.where(t == -float("inf"), s_filled + (G + LOG2E) / k, filled(t))
    else:
        return s_filled, filled(t)


@triton.jit
def _add_exponentials(m, shift, z, s):
    """The running maximum, shift and normaliser of CE, a lane each, with one more tile."""
    m = tl.maximum(m, tl.max(s, 1))
    new = m * LOG2E
    z = z * tl.exp2(shift - new) + tl.sum(tl.exp2(tl.fma(s, LOG2E, -new[:, None])), 1)
    return m, new, z


@triton.jit
def _joined(m, shift):
    """The maximum of all lanes, its shift, and what moves each lane's sums to it."""
    top = tl.max(shift, 0)
    return tl.max(m, 0), top, tl.exp2(shift - top)


@triton.jit
def _not_negative(d):
    """The sum of terms none of which is negative; not maximum: that would lose a NaN."""
    return tl.where(d < 0, 0.0, d)


@triton.jit
def normalisers(
    student_row, teacher_row, V_S, V, k, apart, s_scale, s_softcap, t_scale, t_softcap,
    FAMILY: tl.constexpr, CAREFUL: tl.constexpr, NEEDS_GRAD: tl.constexpr, HAS_TRANSFORM: tl.constexpr,
    RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Maxima, shifts, normalisers and the moments of both rows, online and a lane each; then of all lanes.

    Not CAREFUL takes every logit to be finite; otherwise x_sum or y_sum comes out NaN (0 · −inf), and the row must be
    read again, `apart`. `apart`: CE has exponentials of its own, for tau is not 1.

    `lost` is the share of the sum that weighs `gap_sum`, p or for the reverse KL q, where the other side has 0 and the
    KL's term would be infinite; `kept` the share of the rest, to which gap_sum is confined.
    """
    WEIGHED_BY_Q: tl.constexpr = FAMILY == REVERSE_KL
    BLOCK_V: tl.constexpr = LANES * VEC
    lanes = offsets(LANES, VEC)
    m_s = tl.full([LANES], FLOOR, tl.float32)
    m_t, top = m_s, m_s
    S_q, S_p, S_ce = m_s * k, m_s * k, m_s * LOG2E
    z_q = tl.zeros([LANES], tl.float32)
    z_p, z_ce, x_sum, y_sum, gap_sum = z_q, z_q, z_q, z_q, z_q
    z_lost, z_kept = z_q, z_q
    s_ahead, t_ahead = _first_pair(student_row, teacher_row, 0, lanes, V, BLOCK_V, RAGGED, STAGES, "evict_last")
    for v in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        s, _, t, s_ahead, t_ahead = _next_pair(
            s_ahead, t_ahead, student_row, teacher_row, v, BLOCK_V, lanes, V, s_scale, s_softcap, t_scale, t_softcap,
            BLOCK_V, HAS_TRANSFORM, RAGGED, STAGES, "evict_last",
        )  # fmt: skip
        if CAREFUL:
            infinite = (t if WEIGHED_BY_Q else s) == -float("inf")
            s, t = filled(s), filled(t)
        m_s_new, m_t_new = tl.maximum(m_s, tl.max(s, 1)), tl.maximum(m_t, tl.max(t, 1))
        # the largest logit of the teacher where the student's is the largest
        top = tl.where(m_s_new > m_s, FLOOR, top)
        top = tl.maximum(top, tl.max(tl.where(s == m_s_new[:, None], t, FLOOR), 1))
        m_s, m_t = m_s_new, m_t_new
        S_q_new, S_p_new = m_s * k, m_t * k
        x = tl.fma(s, k, -S_q_new[:, None])
        y = tl.fma(t, k, -S_p_new[:, None])
        q, p = tl.exp2(x), tl.exp2(y)
        # what was summed relative to the old shifts, moved to the new ones
        dx, dy = S_q - S_q_new, S_p - S_p_new
        r_q, r_p = tl.exp2(dx), tl.exp2(dy)
        x_sum = (x_sum + z_q * dx) * r_q + tl.sum(q * x, 1)
        y_sum = (y_sum + z_p * dy) * r_p + tl.sum(p * y, 1)
        z_q = z_q * r_q + tl.sum(q, 1)
        z_p = z_p * r_p + tl.sum(p, 1)
        weight, r = (q, r_q) if WEIGHED_BY_Q else (p, r_p)
        if CAREFUL:
            lost = tl.where(infinite, weight, 0.0)
            z_lost = z_lost * r + tl.sum(lost, 1)
            weight -= lost
            if NEEDS_GRAD:
                z_kept = z_kept * r + tl.sum(weight, 1)
        gap_sum = gap_sum * r + tl.sum(weight * (t - s), 1)
        S_q, S_p = S_q_new, S_p_new
        if apart:
            S_ce_new = m_s * LOG2E
            e = tl.exp2(tl.fma(s, LOG2E, -S_ce_new[:, None]))
            z_ce = z_ce * tl.exp2(S_ce - S_ce_new) + tl.sum(e, 1)
            S_ce = S_ce_new
    m_ce = m_s
    if not apart:
        S_ce, z_ce = S_q, z_q
    for v in range(V, V_S, BLOCK_V):  # entries that only the student has: CE alone
        s = load_tile(student_row, v, lanes, V_S, BLOCK_V, True, "evict_last")
        s, _ = prepare(s, v, lanes, V_S, s_scale, s_softcap, BLOCK_V, HAS_TRANSFORM)
        m_ce, S_ce, z_ce = _add_exponentials(m_ce, S_ce, z_ce, s)

    m_ce, S, r = _joined(m_ce, S_ce)
    S_ce, z_ce = S, tl.sum(z_ce * r, 0)
    m_q, S, r_q = _joined(m_s, S_q)
    top = tl.max(tl.where(m_s == m_q, top, FLOOR), 0)
    x_sum = tl.sum((x_sum + z_q * (S_q - S)) * r_q, 0)
    S_q, z_q = S, tl.sum(z_q * r_q, 0)
    m_p, S, r_p = _joined(m_t, S_p)
    y_sum = tl.sum((y_sum + z_p * (S_p - S)) * r_p, 0)
    S_p, z_p = S, tl.sum(z_p * r_p, 0)
    gap_sum = tl.sum(gap_sum * (r_q if WEIGHED_BY_Q else r_p), 0)
    # a side of −inf alone is no distribution
    no_q, no_p = (m_q == FLOOR) & (z_q == z_q), (m_p == FLOOR) & (z_p == z_p)
    z_q, z_p = tl.where(no_q, 1.0, z_q), tl.where(no_p, 1.0, z_p)
    agree = (top == m_p) & (no_q == 0) & (no_p == 0)
    kept, lost = 1.0, 0.0
    if CAREFUL:
        r = r_q if WEIGHED_BY_Q else r_p
        z_lost = tl.sum(z_lost * r, 0)
        if NEEDS_GRAD:  # which keeps a small share's digits
            z_kept = tl.sum(z_kept * r, 0)
        else:
            z_kept = (z_q if WEIGHED_BY_Q else z_p) - z_lost
        whole = z_kept + z_lost
        whole = tl.where(whole == 0, 1.0, whole)
        kept, lost = z_kept / whole, z_lost / whole
    return m_ce, S_ce, z_ce, S_q, z_q, x_sum, S_p, z_p, y_sum, gap_sum, agree, no_q, no_p, kept, lost


@triton.jit
def measure(
    student_row, teacher_row, V, k, S_q, log2_z_q, S_p, log2_z_p, G, share, careful, close,
    s_scale, s_softcap, t_scale, t_softcap,
    FAMILY: tl.constexpr, HAS_TRANSFORM: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    STAGES: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """D in nats (of a KL the sum of `kl_term`) and Σ q u, from the last tile to the first: the first pass ended there.

    TVD is of first order in an error of the normalisers, which makes p - q sum to r instead of 0: that of D is then
    r · (mass where p > q - ½), and Σ q u is ½ less that mass."""
    BLOCK_V: tl.constexpr = LANES * VEC
    lanes = offsets(LANES, VEC)
    d_sum = tl.zeros([LANES], tl.float32)
    u_sum, r_sum = d_sum, d_sum
    last = (V - 1) // BLOCK_V * BLOCK_V
    s_ahead, t_ahead = _first_pair(student_row, teacher_row, last, lanes, V, BLOCK_V, RAGGED, STAGES, POLICY)
    for done in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        v = last - done
        s, _, t, s_ahead, t_ahead = _next_pair(
            s_ahead, t_ahead, student_row, teacher_row, v, -BLOCK_V, lanes, V, s_scale, s_softcap, t_scale, t_softcap,
            BLOCK_V, HAS_TRANSFORM, RAGGED, STAGES, POLICY,
        )  # fmt: skip
        if careful:
            s, t = filled_pair(s, t, k, G, FAMILY)
        x = tl.fma(s, k, -S_q) - log2_z_q
        y = tl.fma(t, k, -S_p) - log2_z_p
        g = tl.fma(t - s, k, -G)
        if FAMILY == FORWARD_KL:
            q, p = tl.exp2(x), tl.exp2(y)
            d_sum += tl.sum(kl_term(p, p - q, g * LN2), 1)
        elif FAMILY == REVERSE_KL:
            q, p = tl.exp2(x), tl.exp2(y)
            d_sum += tl.sum(kl_term(q, q - p, g * -LN2), 1)
        else:
            larger = tl.exp2(tl.where(g > 0, y, x))
            e, w, log2_m = mixture(g, share, close)
            smaller = tl.fma(larger, e, larger)
            q, p = tl.where(g > 0, smaller, larger), tl.where(g > 0, larger, smaller)
            d = terms(p, q, larger, g, e, log2_m, share, close, FAMILY)
            d_sum += tl.sum(d, 1)
            if FAMILY == TVD:
                r_sum += tl.sum(tl.where(g > 0, d, -d), 1)
            u_sum += tl.sum(q * slope(g, e, w, log2_m, share, FAMILY), 1)
    mean_u = tl.sum(u_sum, 0)
    return _not_negative(tl.sum(d_sum, 0) + mean_u * 2.0 * tl.sum(r_sum, 0)), mean_u


@triton.jit
def gradient(
    student_row, teacher_row, grad_row, V_S, V, k, label,
    S_q, z_q, S_p, z_p, G, S_ce, z_ce, mean_u, kept, weight_d, weight_ce, share, apart, careful, close,
    s_scale, s_softcap, t_scale, t_softcap,
    FAMILY: tl.constexpr, HAS_TRANSFORM: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes weight_d · tau · dD/ds + weight_ce · dCE/ds; returns the sum of `kl_term` in nats where the row is `close`
    and D a KL. `kept` is the part of p whose terms the forward KL has.

    The gradient may lie over the student's logits: this pass is the last to read them, and reads each tile once; a tile
    is written when all of it has been read (by the thread that read it, or after a barrier where the compiler moves it
    to another), and the tiles that are read ahead are others. That holds, too, where the compiler pipelines the loop
    and their copies are in flight while this one is written: it only moves reads up, no two tiles share an element, and
    each turn waits, all threads together, for the whole of its own copies before it takes them from shared memory. What
    of a ragged last tile fills no vector is read in that tile's own turn.
    """
    BLOCK_V: tl.constexpr = LANES * VEC
    KL: tl.constexpr = (FAMILY == FORWARD_KL) | (FAMILY == REVERSE_KL)
    lanes = offsets(LANES, VEC)
    c_ce = weight_ce / z_ce
    c_q, c_p = weight_d / z_q, weight_d / z_p
    if FAMILY == FORWARD_KL:
        c_q *= kept
    c_shared = 0.0  # CE's part where its exponential is q's
    if (apart == 0) & (weight_ce != 0):
        c_shared = c_ce * tl.exp2(S_q - S_ce)
    own = apart & (weight_ce != 0)
    d_sum = tl.zeros([LANES], tl.float32)
    for v in range(V, V_S, BLOCK_V):
        s = load_tile(student_row, v, lanes, V_S, BLOCK_V, True, "evict_first")
        s, ds = prepare(s, v, lanes, V_S, s_scale, s_softcap, BLOCK_V, HAS_TRANSFORM)
        grad = tl.zeros([LANES, VEC], tl.float32)
        if weight_ce != 0:
            grad = c_ce * tl.exp2(tl.fma(s, LOG2E, -S_ce)) - tl.where(v + lanes == label, weight_ce, 0.0)
        store_tile(grad_row, v, lanes, grad * ds, V_S, BLOCK_V, True)
    # each pass the other way than the one before it: the KL's is the second, the others' the third
    last = (V - 1) // BLOCK_V * BLOCK_V
    first = last if KL else 0
    step = -BLOCK_V if KL else BLOCK_V
    s_ahead, t_ahead = _first_pair(student_row, teacher_row, first, lanes, V, BLOCK_V, RAGGED, STAGES, "evict_first")
    for done in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        v = last - done if KL else done
        s, ds, t, s_ahead, t_ahead = _next_pair(
            s_ahead, t_ahead, student_row, teacher_row, v, step, lanes, V, s_scale, s_softcap, t_scale, t_softcap,
            BLOCK_V, HAS_TRANSFORM, RAGGED, STAGES, "evict_first",
        )  # fmt: skip
        grad = tl.zeros([LANES, VEC], tl.float32)
        if own:
            grad = c_ce * tl.exp2(tl.fma(s, LOG2E, -S_ce))
        if careful:
            s, t = filled_pair(s, t, k, G, FAMILY)
        q = tl.exp2(tl.fma(s, k, -S_q))
        g = tl.fma(t - s, k, -G)
        if FAMILY == FORWARD_KL:
            p = tl.exp2(tl.fma(t, k, -S_p))
            grad = tl.fma(q, c_q + c_shared, grad)
            grad = tl.fma(p, -c_p, grad)
            if close:
                p, q = p / z_p, q / z_q
                d_sum += tl.sum(kl_term(p, p - q, g * LN2), 1)
        else:
            e, w, log2_m = mixture(g, share, close)
            u = slope(g, e, w, log2_m, share, FAMILY)
            grad = tl.fma(q, tl.fma(u - mean_u, c_q, c_shared), grad)
            if FAMILY == REVERSE_KL:  # noqa: SIM102
                if close:
                    q, p = q / z_q, tl.exp2(tl.fma(t, k, -S_p)) / z_p
                    d_sum += tl.sum(kl_term(q, q - p, g * -LN2), 1)
        if (label >= v) & (label < v + BLOCK_V):
            grad = tl.where(v + lanes == label, grad - weight_ce, grad)
        if HAS_TRANSFORM:
            grad = grad * ds
        store_tile(grad_row, v, lanes, grad, V, BLOCK_V, RAGGED)
    return _not_negative(tl.sum(d_sum, 0))
