"""How far a tensor is from another one, in norm."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in float64; for tensors of any shape, empty ones among them."""
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-12))
