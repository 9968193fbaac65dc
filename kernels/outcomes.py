"""A few outcomes compared in fp64: what is left of D once a vocabulary has been summed up. What it computes is
`sparse_distillation_rows` of `pocl_fast/loss/reference.py`.

In fp64 a difference of near numbers keeps enough digits as it is: exp(-gap) - 1 has 10 of them where gap is 1e-6. (A
row has K outcomes and V logits: at K = 64 it is nothing, at K = 1024 on a GPU with few fp64 units a third more.)
"""

import triton
import triton.language as tl

from pocl_fast.kernels.divergence import FORWARD_KL, JSD, REVERSE_KL, SKEW_FORWARD_KL, TVD

LOG2E64 = tl.constexpr(1.4426950408889634)
NO_MASS = tl.constexpr(-1e30)  # log of a weight of 0; finite, so that 0 times it is 0


@triton.jit
def natural_log(x):
    """Of fp64."""
    return tl.log(x.to(tl.float64))


@triton.jit
def log_sum(largest, x, inside, rest, rest_inside):
    """log Σ exp(x - largest) where `inside`, and of the rest; `largest` is their maximum. NaN where one of them is."""
    total = tl.sum(tl.where(inside, tl.exp(x - largest), 0.0), 0)
    return tl.log(total + tl.where(rest_inside, tl.exp(rest - largest), 0.0))


@triton.jit
def maximum(x, inside, rest, rest_inside):
    """The largest of x where `inside`, and the rest; 0 where there is neither."""
    top = tl.max(tl.where(inside, x, -float("inf")), 0)
    top = tl.where(rest_inside & (rest > top), rest, top)
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def rest_log_weight(listed_mass, others, tau):
    """log of the weight of `others` entries at temperature tau among which the mass that is not listed is spread
    evenly: others · (mass / others)^(1 / tau)."""
    mass = 1.0 - listed_mass
    log_n = natural_log(tl.maximum(others, 1))
    return tl.where(mass <= 0, NO_MASS, log_n + (tl.log(tl.where(mass <= 0, 1.0, mass)) - log_n) / tau)


@triton.jit
def kl_term(a, gap, difference):
    """a · log(a / b) - a + b >= 0 for gap = log(a / b) and difference = a - b; their sum is KL(a‖b)."""
    return a * gap - difference


@triton.jit
def outcome(x, y, inside, teacher_share, FAMILY: tl.constexpr):
    """From log q and log p: q, p, p - q, the term of D, and u = ∂D/∂q up to a constant; 0 where not `inside`."""
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    a, b = teacher_share, 1.0 - teacher_share
    gap = y - x
    p_larger = gap > 0
    larger = tl.where(inside, tl.exp(tl.where(p_larger, y, x)), 0.0)
    e = tl.exp(-tl.abs(gap)) - 1.0  # the smaller over the larger, less 1
    smaller = larger * (1.0 + e)
    q, p = tl.where(p_larger, smaller, larger), tl.where(p_larger, larger, smaller)
    difference = tl.where(p_larger, -larger * e, larger * e)
    if FAMILY == FORWARD_KL:
        d, u = kl_term(p, gap, difference), tl.zeros_like(gap)
    elif FAMILY == REVERSE_KL:
        d, u = kl_term(q, -gap, -difference), -gap
    elif FAMILY == TVD:
        d, u = 0.5 * tl.abs(difference), tl.where(gap < 0, 0.5, tl.where(p_larger, -0.5, gap))
    else:
        w = tl.where(p_larger, b, a) * e  # m over the larger, less 1
        log_m = tl.log(1.0 + w)
        log_p_m = tl.where(p_larger, 0.0, gap) - log_m
        log_q_m = tl.where(p_larger, -gap, 0.0) - log_m
        ratio = tl.where(p_larger, -b, b) * e / (1.0 + w)  # p / m - 1
        of_p, of_q = kl_term(p, log_p_m, b * difference), kl_term(q, log_q_m, -a * difference)
        if FAMILY == JSD:
            d, u = a * of_p + b * of_q, b * log_q_m
        elif FAMILY == SKEW_FORWARD_KL:
            d, u = of_p, -b * ratio
        else:
            d, u = of_q, log_q_m + a * ratio
    return q, p, difference, d, u


@triton.jit
def compare(x, y, inside, rest, y_rest, rest_inside, teacher_share, FAMILY: tl.constexpr):
    """D, the teacher's entropy, and q · (u - Σ q u) of the listed outcomes and of the rest, from logarithms of weights:
    x and y of the student's and the teacher's entries, `rest` and `y_rest` of theirs."""
    # the largest first, then the logarithm: their sum would lose that where all are as small as a mask's -1e30
    x_top, y_top = maximum(x, inside, rest, rest_inside), maximum(y, inside, y_rest, rest_inside)
    x_log = log_sum(x_top, x, inside, rest, rest_inside)
    y_log = log_sum(y_top, y, inside, y_rest, rest_inside)
    x, rest = (x - x_top) - x_log, (rest - x_top) - x_log
    y, y_rest = (y - y_top) - y_log, (y_rest - y_top) - y_log
    q, p, difference, d, u = outcome(x, y, inside, teacher_share, FAMILY)
    q_rest, p_rest, difference_rest, d_rest, u_rest = outcome(rest, y_rest, rest_inside, teacher_share, FAMILY)
    D = tl.sum(d, 0) + d_rest
    D = tl.where(D < 0, 0.0, D)  # not maximum: that would lose a NaN
    entropy = -tl.sum(tl.where(p > 0, p * y, p), 0) - tl.where(p_rest > 0, p_rest * y_rest, p_rest)
    if FAMILY == FORWARD_KL:
        g, g_rest = -difference, -difference_rest
    else:
        mean_u = tl.sum(q * u, 0) + q_rest * u_rest
        g, g_rest = q * (u - mean_u), q_rest * (u_rest - mean_u)
    return D, entropy, g, g_rest
