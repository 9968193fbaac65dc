"""Exponentials and logarithms of a tile, where Triton's own are too slow or not good enough near 0."""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Logits below FLOOR count as none: what pads a tile is FILL, and a running maximum starts at FLOOR. Both are finite, so
# that 0 · x stays 0 and no difference of two of them becomes NaN; far enough apart that exp(FILL - FLOOR) is 0.
FILL = tl.constexpr(-1e28)
FLOOR = tl.constexpr(-1e27)

# Triton's log2 is a function of 20 instructions and its division has 8; NVIDIA's special-function units need 1 and 2
_HAS_FAST = tl.constexpr(torch.version.hip is None and not knobs.runtime.interpret)

# adding it rounds a small number to an integer, which the sum's low bits then hold
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def fast_log2(x):
    """log2 x for normal x: within 2^-22 of it between ½ and 2, and of its own size elsewhere."""
    if _HAS_FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def fast_divide(x, y):
    """x / y to 2 ulp, for a y that is neither huge nor tiny."""
    if _HAS_FAST:
        return libdevice.fast_dividef(x, y)
    return x / y


@triton.jit
def exp2_minus_1(x):
    """2^x - 1 for x <= 0, to fp32's precision also where it is near 0. Loses a NaN."""
    x = tl.maximum(x, -126.0)
    shifted = x + _ROUNDER
    f = x - (shifted - _ROUNDER)
    e = tl.fma(f, 1.54035086e-4, 1.33907358e-3)
    e = tl.fma(e, f, 9.61823751e-3)
    e = tl.fma(e, f, 5.55035743e-2)
    e = tl.fma(e, f, 0.240226498)
    e = tl.fma(e, f, 0.693147188) * f
    whole = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^(x - f)
    return tl.fma(whole, e, whole - 1.0)


@triton.jit
def log_1_plus(w):
    """log(1 + w) for -1 < w <= 0, to fp32's precision also where it is near 0; nats."""
    e = tl.fma(w, -0.33979694, 0.14391549)  # minimax of log(1 + w) / w for -¼ <= w
    e = tl.fma(e, w, -0.25779932)
    e = tl.fma(e, w, 0.33285667)
    e = tl.fma(e, w, -0.5000105)
    e = tl.fma(e, w, 0.99999996)
    return tl.where(w > -0.25, e * w, fast_log2(1.0 + w) * LN2)


@triton.jit
def transformed(x, scale, softcap):
    """`transformed` of `loss/reference.py`, and its derivative. Infinities, NaN and what is below FLOOR stay."""
    slope = tl.zeros_like(x) + scale
    y = x * scale
    if softcap > 0:
        # tanh z = (1 - r) / (1 + r) and its derivative 4r / (1 + r)², r = exp(-2|z|): no difference of near numbers
        twice = tl.abs(y) * ((-2 * LOG2E) / softcap)
        e = exp2_minus_1(twice)
        r = tl.exp2(twice)
        magnitude = softcap * (-e / (2.0 + e))
        y = tl.where(y < 0, -magnitude, magnitude)
        slope = scale * (4.0 * r / ((1.0 + r) * (1.0 + r)))
    ordinary = tl.abs(x) < -FLOOR
    return tl.where(ordinary, y, x), slope
