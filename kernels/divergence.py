"""The maths of each divergence on one tile, in base 2: x and y are log2 of the unnormalised q and p.

A family is two functions: `moment`, what pass 1 sums up so that D needs no pass of its own, and `gradient`, dD/ds · tau
of one entry. What they compute is `pocl_fast/reference.py`.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

FAMILIES = {"forward_kl": 0, "reverse_kl": 1}
FORWARD_KL = tl.constexpr(FAMILIES["forward_kl"])


@triton.jit
def moment(q, p, x, y, out, FAMILY: tl.constexpr):
    """The terms of Σ p (y - x) for forward KL, Σ q (x - y) for reverse KL: a difference of near values where the two
    distributions are near, so D of a close student keeps its digits. `out` entries are not part of D (their x, y are
    −inf)."""
    if FAMILY == FORWARD_KL:
        return tl.where(out, 0.0, p * (y - x))
    return tl.where(out, 0.0, q * (x - y))


@triton.jit
def moment_shift(z_q, z_p, dx, dy, FAMILY: tl.constexpr):
    """What the moment so far gains when every x moves by dx and every y by dy."""
    if FAMILY == FORWARD_KL:
        return z_p * (dy - dx)
    return z_q * (dx - dy)


@triton.jit
def divergence(moment_sum, z_q, z_p, FAMILY: tl.constexpr):
    """D in nats from the moment and the normalisers; never negative, NaN where something was."""
    if FAMILY == FORWARD_KL:
        d = (moment_sum / z_p + tl.log2(z_q / z_p)) * LN2
    else:
        d = (moment_sum / z_q + tl.log2(z_p / z_q)) * LN2
    return tl.where(d < 0, 0.0, d)  # not maximum: that would lose a NaN


@triton.jit
def gradient(q, p, log2_q, log2_p, out, d, FAMILY: tl.constexpr):
    """tau · dD/ds of each entry, from normalised q and p."""
    if FAMILY == FORWARD_KL:
        return q - p
    return tl.where(out, 0.0, q * ((log2_q - log2_p) * LN2 - d))
