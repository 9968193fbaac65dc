"""How far a tensor is from another one, in norm."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor, unit: float = 0.0) -> float:
    """|got - want| / |want| in norm. A distance below 1e-14, or below rounding each element to a multiple of `unit`
    (fp16's smallest number), is none: the reference's own 0 is that inexact."""
    got, want = got.detach().double(), want.detach().double()
    distance = (got - want).norm() - 0.5 * unit * want.numel() ** 0.5
    return 0.0 if distance <= 1e-14 else float(distance / want.norm())
