"""What every kernel of a loss is given beside its logits: values a token, and settings of the call.

Two tuples, which an operator takes apart into the plain values of its schema (`*tokens, *settings`) and puts together
again. Nothing is checked here: see `checks.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IDENTITY = [1.0, 0.0]  # the transform that leaves logits as they are


class Tokens(NamedTuple):
    """The labels of N tokens, and three factors: one value a token, or one for all."""

    labels: Tensor  # [N] int32 or int64
    temperature: Tensor  # [1] or [N] fp32
    alpha: Tensor  # [1] or [N] fp32
    row_scale: Tensor  # [1] or [N] fp32: the token's weight over the divisor, multiplied onto loss and gradient


class Settings(NamedTuple):
    """What is computed of every token."""

    divergence: str  # one of objective.DIVERGENCES
    teacher_share: float  # the teacher's weight in the mixture of p and q
    temperature_power: int  # the p of c(τ) = τ^p
    ignore_index: int
    transforms: list[float]  # scale and softcap (0: none) of the student's logits, then of the teacher's
    tail: str = "bucket"  # one of teacher_output.TAILS; read where the teacher is K entries a token
