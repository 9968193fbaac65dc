"""A few outcomes compared in fp64: what is left of D once a vocabulary has been summed up. What it computes is
`sparse_distillation_rows` of `pocl_fast/loss/reference.py`; the terms of each divergence are in `divergence.py`.

A row has K outcomes and V logits. At K = 64 the fp64 arithmetic costs nothing, at K = 1024 on a GPU with few fp64 units
a third of the time more.
"""

import triton
import triton.language as tl

from pocl_fast.kernels.divergence import FORWARD_KL, outcome

LOG2E64 = tl.constexpr(1.4426950408889634)
# of a teacher's rest: below it is the rounding of fp32 log-probabilities; of a list in which some are −inf
LEAST_MASS, LEAST_OF_FILTERED = tl.constexpr(2.0**-23), tl.constexpr(2.0**-20)


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
def exists(inside, rest_inside):
    """Whether some outcome is `inside`, or the rest."""
    return (tl.max(inside.to(tl.int32), 0) != 0) | rest_inside


@triton.jit
def rest_log_weight(listed_mass, others, is_filtered, tau):
    """Whether `others` entries have a weight at temperature tau, among which the mass that is not listed is spread
    evenly; and its log: others · (mass / others)^(1 / tau)."""
    mass = 1.0 - listed_mass
    none = (mass < tl.where(is_filtered, LEAST_OF_FILTERED, LEAST_MASS)) | (others <= 0)
    log_n = natural_log(tl.maximum(others, 1))
    return none == 0, log_n + (tl.log(tl.where(none, 1.0, mass)) - log_n) / tau


@triton.jit
def compare(x, y, in_q, in_p, rest, y_rest, rest_in_q, rest_in_p, teacher_share, FAMILY: tl.constexpr):
    """D, the teacher's entropy, and tau · dD/ds of the listed outcomes and of the rest, from logarithms of weights: x
    and y of the student's and the teacher's entries, `rest` and `y_rest` of theirs; 0 where not in q or p."""
    # the largest first, then the logarithm: their sum would lose that where all are as small as a mask's -1e30
    x_top, y_top = maximum(x, in_q, rest, rest_in_q), maximum(y, in_p, y_rest, rest_in_p)
    x_log = log_sum(x_top, x, in_q, rest, rest_in_q)
    y_log = log_sum(y_top, y, in_p, y_rest, rest_in_p)
    x, rest = (x - x_top) - x_log, (rest - x_top) - x_log
    y, y_rest = (y - y_top) - y_log, (y_rest - y_top) - y_log
    q, p, difference, d, u, lost = outcome(x, y, in_q, in_p, teacher_share, FAMILY)
    q_rest, p_rest, difference_rest, d_rest, u_rest, lost_rest = outcome(
        rest, y_rest, rest_in_q, rest_in_p, teacher_share, FAMILY
    )
    entropy = -tl.sum(tl.where(p > 0, p * y, p), 0) - tl.where(p_rest > 0, p_rest * y_rest, p_rest)
    D = tl.sum(d, 0) + d_rest
    lost_all = tl.sum(lost, 0) + lost_rest
    # only a sum without its infinite terms may be negative; not maximum: that would lose a NaN
    D = tl.where((D < 0) & (lost_all == 0), 0.0, D) - lost_all
    if FAMILY == FORWARD_KL:
        kept = tl.sum(tl.where(in_q, p, 0.0), 0) + tl.where(rest_in_q, p_rest, 0.0)
        g = tl.where(in_q, q * kept - p, 0.0)
        g_rest = tl.where(rest_in_q, q_rest * kept - p_rest, 0.0)
        if lost_all == 0:  # the difference of near numbers in all its digits
            g, g_rest = -difference, -difference_rest
    else:
        mean_u = tl.sum(q * u, 0) + q_rest * u_rest
        g, g_rest = q * (u - mean_u), q_rest * (u_rest - mean_u)
    # a side without a weight is no distribution; a NaN shows whatever the other side is
    nothing = (exists(in_q, rest_in_q) == 0) | (exists(in_p, rest_in_p) == 0)
    nothing = nothing & (x_log == x_log) & (y_log == y_log)
    D, g, g_rest = tl.where(nothing, 0.0, D), tl.where(nothing, 0.0, g), tl.where(nothing, 0.0, g_rest)
    return D, entropy, g, g_rest
