"""A few outcomes compared in fp64: what is left of D once a vocabulary has been summed up. What it computes is
`sparse_distillation_rows` of `pocl_fast/loss/reference.py`; the terms of each divergence are in `divergence.py`.

A row has K outcomes and V logits. At K = 64 the fp64 arithmetic costs nothing, at K = 1024 on a GPU with few fp64 units
a third of the time more.
"""

import triton
import triton.language as tl

from pocl_fast.kernels.divergence import FORWARD_KL, outcome

LOG2E64 = tl.constexpr(1.4426950408889634)
NO_MASS = tl.constexpr(-1e30)  # log of a weight of 0; finite, so that 0 times it is 0


@triton.jit
def natural_log(x):
    """The natural logarithm of x, in fp64."""
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
