"""The maths of each divergence: on one tile in fp32, and of a few outcomes in fp64. Here, in FAMILIES, a kernel knows a
divergence by its number. What is computed is `pocl_fast/loss/reference.py`. docs/adding-a-divergence.md lists what a
new one needs.

Everything starts from g = log2(p / q), taken from the logits themselves: near 0 it keeps the digits that p - q, or the
difference of two logarithms, has lost. With the smaller and the larger of p and q, E = smaller / larger - 1 and the
smaller's share κ of the mixture, m = larger · (1 + κE). A row is `close` where D is so small that it must be summed
from terms none of which is negative; elsewhere the shorter formula is as good.
"""

import triton
import triton.language as tl

from pocl_fast.kernels.arithmetic import LN2, LOG2E, exp2_minus_1, fast_divide, fast_log2, log_1_plus

FAMILIES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_forward_kl": 3, "skew_reverse_kl": 4, "tvd": 5}
FORWARD_KL = tl.constexpr(FAMILIES["forward_kl"])
REVERSE_KL = tl.constexpr(FAMILIES["reverse_kl"])
JSD = tl.constexpr(FAMILIES["jsd"])
SKEW_FORWARD_KL = tl.constexpr(FAMILIES["skew_forward_kl"])
SKEW_REVERSE_KL = tl.constexpr(FAMILIES["skew_reverse_kl"])
TVD = tl.constexpr(FAMILIES["tvd"])

NO_MASS = tl.constexpr(-1e30)  # the logarithm of 0; finite, so that 0 times it is 0


@triton.jit
def relative_size(teacher_share, FAMILY: tl.constexpr):
    """About how large D is between near distributions, over their KL."""
    if FAMILY == JSD:
        return teacher_share * (1 - teacher_share)
    elif FAMILY == SKEW_FORWARD_KL:
        return (1 - teacher_share) * (1 - teacher_share)
    elif FAMILY == SKEW_REVERSE_KL:
        return teacher_share * teacher_share
    else:
        return 1.0


@triton.jit
def kl_term(a, difference, gap):
    """a · log(a / b) - a + b >= 0 for gap = log(a / b) and difference = a - b: the terms of KL(a‖b), whose sum is the
    same because a and b both sum to 1. Near 0 it is a · (exp(-gap) - 1 + gap) by its series: the error is then relative
    to D itself, down to 0 between equals, and an error in the normalisers counts only squared."""
    h = tl.fma(gap, 1.3888889e-3, -8.3333333e-3)
    h = tl.fma(h, gap, 4.1666667e-2)
    h = tl.fma(h, gap, -1.6666667e-1)
    h = tl.fma(h, gap, 0.5)
    square = gap * gap
    return tl.where(square < 0.0625, a * (square * h), a * gap - difference)


@triton.jit
def mixture(g, teacher_share, close):
    """E, κE and log2(1 + κE): see the module."""
    share = tl.where(g > 0, 1 - teacher_share, teacher_share)
    h = -tl.abs(g)
    if close:
        e = exp2_minus_1(h)
        w = share * e
        log2_m = log_1_plus(w) * LOG2E
    else:
        e = tl.exp2(h) - 1.0
        w = share * e
        log2_m = fast_log2(1.0 + w)
    return e, w, log2_m


@triton.jit
def slope(g, e, w, log2_m, teacher_share, FAMILY: tl.constexpr):
    """u = ∂D/∂q of each entry, up to a constant; dD/ds is q · (u - Σ q u) / tau. (Forward KL's is q - p over tau.)"""
    log2_q_m = -log2_m - tl.maximum(g, 0.0)  # log2(q / m)
    v = (1 - teacher_share) * fast_divide(tl.where(g > 0, -e, e), 1.0 + w)  # (p - m) / m
    if FAMILY == REVERSE_KL:
        return g * -LN2
    elif FAMILY == JSD:
        return (1 - teacher_share) * LN2 * log2_q_m
    elif FAMILY == SKEW_FORWARD_KL:
        return (teacher_share - 1) * v
    elif FAMILY == SKEW_REVERSE_KL:
        return log2_q_m * LN2 + teacher_share * v
    else:
        tl.static_assert(FAMILY == TVD)
        return tl.where(g < 0, 0.5, tl.where(g > 0, -0.5, 0.0))


@triton.jit
def terms(p, q, larger, g, e, log2_m, teacher_share, close, FAMILY: tl.constexpr):
    """The terms of D of a mixture or TVD, in nats."""
    a, b = teacher_share, 1 - teacher_share
    log_p_m = (tl.minimum(g, 0.0) - log2_m) * LN2
    log_q_m = (-tl.maximum(g, 0.0) - log2_m) * LN2
    difference = larger * tl.where(g > 0, -e, e)  # p - q
    if FAMILY == JSD:
        if close:
            d = a * kl_term(p, b * difference, log_p_m) + b * kl_term(q, -a * difference, log_q_m)
        else:
            d = a * p * log_p_m + b * q * log_q_m
    elif FAMILY == SKEW_FORWARD_KL:
        if close:
            d = kl_term(p, b * difference, log_p_m)
        else:
            d = p * log_p_m
    elif FAMILY == SKEW_REVERSE_KL:
        if close:
            d = kl_term(q, -a * difference, log_q_m)
        else:
            d = q * log_q_m
    else:
        tl.static_assert(FAMILY == TVD)
        d = larger * (e * -0.5)
    return d


# ---- a few outcomes, in fp64: the sparse kernel ----


@triton.jit
def kl_term_fp64(a, gap, difference):
    """a · log(a / b) - a + b >= 0 for gap = log(a / b) and difference = a - b; their sum is KL(a‖b)."""
    return a * gap - difference


@triton.jit
def outcome(x, y, in_q, in_p, teacher_share, FAMILY: tl.constexpr):
    """In fp64, from log q and log p: q, p, p - q, the term of D, u = ∂D/∂q up to a constant, and what of p, or for the
    reverse KL of q, has no term because that is infinite. q is 0 where not `in_q`, p where not `in_p`.

    A KL's terms are those of `kl_term_fp64`: their sum is D and what has no term.

    A difference of near numbers keeps enough digits in fp64: exp(-gap) - 1 has 10 of them where gap is 1e-6."""
    x, y = tl.where(in_q, x, NO_MASS), tl.where(in_p, y, NO_MASS)
    a, b = teacher_share, 1.0 - teacher_share
    gap = y - x
    p_larger = gap > 0
    larger = tl.exp(tl.where(p_larger, y, x))
    e = tl.exp(-tl.abs(gap)) - 1.0  # the smaller over the larger, less 1
    smaller = larger * (1.0 + e)
    q, p = tl.where(p_larger, smaller, larger), tl.where(p_larger, larger, smaller)
    difference = tl.where(p_larger, -larger * e, larger * e)
    lost = tl.zeros_like(gap)
    if FAMILY == FORWARD_KL:
        d, u = tl.where(in_q, kl_term_fp64(p, gap, difference), 0.0), tl.zeros_like(gap)
        lost = tl.where(in_q, 0.0, p)
    elif FAMILY == REVERSE_KL:
        d, u = tl.where(in_p, kl_term_fp64(q, -gap, -difference), 0.0), tl.where(in_p, -gap, -1.0)
        lost = tl.where(in_p, 0.0, q)
    elif FAMILY == TVD:
        d, u = 0.5 * tl.abs(difference), tl.where(gap < 0, 0.5, tl.where(p_larger, -0.5, gap))
    else:
        w = tl.where(p_larger, b, a) * e  # m over the larger, less 1
        log_m = tl.log(1.0 + w)
        log_p_m = tl.where(p_larger, 0.0, gap) - log_m
        log_q_m = tl.where(p_larger, -gap, 0.0) - log_m
        ratio = tl.where(p_larger, -b, b) * e / (1.0 + w)  # p / m - 1
        of_p, of_q = kl_term_fp64(p, log_p_m, b * difference), kl_term_fp64(q, log_q_m, -a * difference)
        if FAMILY == JSD:
            d, u = a * of_p + b * of_q, b * log_q_m
        elif FAMILY == SKEW_FORWARD_KL:
            d, u = of_p, -b * ratio
        else:
            tl.static_assert(FAMILY == SKEW_REVERSE_KL)
            d, u = of_q, log_q_m + a * ratio
    return q, p, difference, d, u, lost
