"""What both losses do before and after their kernels: values for each token, the divisor, and the output.

`prepare` turns a call's options into the `Tokens` and `Settings` of its kernel. `Prepared` turns what the kernel or the
reference gives into a `LossOutput`. Knows nothing of logits and hidden states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.checks import Backend, Reduction, check_labels_within, check_reduction
from pocl_fast.loss.kinds import check_integer, check_tensor
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.loss.reference import Rows
from pocl_fast.loss.teacher_output import TopKTeacher


class Weighing(NamedTuple):
    """How the losses of tokens become one: the options that both losses share."""

    token_weights: Tensor | None
    num_items: Tensor | float | None
    reduction: Reduction
    ignore_index: int


class Prepared(NamedTuple):
    """A call whose arguments are checked: what its kernel is given, and how its output is made."""

    tokens: Tokens
    settings: Settings
    num_tokens: Tensor  # 0-d: supervised tokens
    reduced: bool  # to one number
    late_divisor: Tensor | float | None  # what the kernel's loss is still to be divided by

    def output(self, loss: Tensor, stats: Tensor) -> LossOutput:
        """From a kernel's loss, [] or [N], and stats [7, N]."""
        if self.late_divisor is not None:
            loss = loss / self.late_divisor
        return LossOutput(loss, self.num_tokens, stats.detach())

    def reference_output(self, rows: Rows) -> LossOutput:
        counted = self.tokens.labels != self.settings.ignore_index
        loss = rows.loss * torch.where(counted, self.tokens.row_scale, 0.0)
        return LossOutput(
            loss.sum() if self.reduced else loss, self.num_tokens, torch.stack([value.detach() for value in rows])
        )


def prepare(
    labels: Tensor,  # [N]
    objective: Objective,
    weighing: Weighing,
    *,
    transforms: list[float],
    tail: str,
    V: int,  # the student's vocabulary
    dtype: torch.dtype,  # of the values a token: fp32, or float64 for the reference, which must not round 1.33
    half: bool,  # whether the gradient is fp16
    backend: Backend,
    top_k: TopKTeacher | None = None,
) -> Prepared:
    """Raises ValueError for a reduction, number of items, weights, temperature or alpha that cannot be, and for a label
    outside the vocabulary on a CPU, but for C++, whose binding looks for itself; there, too, for the entries of `top_k`
    that cannot be. TypeError for weights or an ignore_index of another kind."""
    check_integer("ignore_index", weighing.ignore_index)
    if weighing.token_weights is not None:
        check_tensor("token_weights", weighing.token_weights)
    counted = labels != weighing.ignore_index
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if backend != "cpp":
            check_labels_within(labels, counted, V)
        if top_k is not None:
            top_k.check_entries(counted, V)
    num_tokens = counted.sum()
    divisor = _divisor(weighing, num_tokens)
    weights = 1.0 if weighing.token_weights is None else weighing.token_weights
    row_scale = per_token("token_weights", weights, labels, dtype)
    # of a mean most of fp16's gradient would be below its smallest number before a GradScaler has made it larger
    late = half and backend != "reference"
    if not late:
        row_scale = row_scale / divisor
    if backend != "reference":
        row_scale = row_scale.float().contiguous()
    temperature = per_token("temperature", objective.temperature, labels, dtype)
    alpha = per_token("alpha", objective.alpha, labels, dtype)
    settings = Settings(
        objective.family,
        objective.teacher_share,
        objective.temperature_power,
        weighing.ignore_index,
        transforms,
        tail,
    )
    tokens = Tokens(labels, temperature, alpha, row_scale)
    return Prepared(tokens, settings, num_tokens, weighing.reduction != "none", divisor if late else None)


def per_token(name: str, value: Tensor | float, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or tensor as [1] or [N] on the labels' device, without looking into it."""
    if not isinstance(value, Tensor):
        # not `full`, which torch.compile would compile again for each value
        return torch.ones(1, device=labels.device, dtype=dtype) * value
    flat, N = value.detach().reshape(-1), labels.numel()
    if flat.numel() not in (1, N):
        raise ValueError(f"{name} must be one value or one a token ({N}), got shape {tuple(value.shape)}")
    return flat.to(device=labels.device, dtype=dtype, non_blocking=True)


def _divisor(weighing: Weighing, num_tokens: Tensor) -> Tensor | float:
    """What the reduction divides each token's loss by."""
    check_reduction(weighing.reduction, weighing.num_items)
    if weighing.reduction != "mean":
        return 1.0
    if weighing.num_items is None:
        return num_tokens.clamp_min(1)
    if isinstance(weighing.num_items, Tensor):
        return weighing.num_items.detach().reshape(())
    return weighing.num_items
