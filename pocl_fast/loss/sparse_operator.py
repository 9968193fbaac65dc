"""The torch operator behind a loss whose teacher is K entries a token (`TopKTeacher`): the sparse half of `ops.py`.

Checks nothing that the public functions have checked. On a CPU the C++ binding looks at the indices; on a GPU nobody
does, for that would wait for it: a kernel run with TRITON_DEBUG=1 stops at one that is outside the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocl_fast.loss import row_operator

TAILS = ("bucket", "renormalise")  # what D makes of the entries that are not listed: one more outcome, or nothing


@torch.library.custom_op("pocl_fast::sparse_distillation_rows", mutates_args=())
def sparse_distillation_rows(
    student: Tensor,  # [N, V], last dimension contiguous
    log_probs: Tensor,  # [N, K] at temperature 1; −inf: no entry
    indices: Tensor,  # [N, K] int32 or int64, distinct in a row; not looked at where log_probs is −inf
    labels: Tensor,  # [N] int32 or int64
    temperature: Tensor,  # [1] or [N] fp32
    alpha: Tensor,  # [1] or [N] fp32
    row_scale: Tensor,  # [1] or [N] fp32: token weight over the divisor, folded into loss and gradient
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    tail: str,  # one of TAILS
    transform: list[float],  # scale and softcap (0: none) of the student
    needs_grad: bool,
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.distillation_rows`: loss, [] or [N], stats [7, N] and gradient [N, V]."""
    return row_operator.backend_module(backend, "sparse").sparse_distillation_rows(
        student,
        log_probs,
        indices,
        labels,
        temperature,
        alpha,
        row_scale,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        tail=tail,
        transform=transform,
        needs_grad=needs_grad,
        reduced=reduced,
    )


@sparse_distillation_rows.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_grad, reduced, _backend = others
    return row_operator.empty_outputs(student, needs_grad, reduced)


@torch.library.custom_op("pocl_fast::sparse_distillation_rows_", mutates_args=("student",))
def sparse_distillation_rows_(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor,
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    tail: str,
    transform: list[float],
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The first two of `sparse_distillation_rows`; the gradient takes the place of the logits in `student`. Autograd
    learns of it by `ops.with_gradient`."""
    loss, stats, _ = row_operator.backend_module(backend, "sparse").sparse_distillation_rows(
        student,
        log_probs,
        indices,
        labels,
        temperature,
        alpha,
        row_scale,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        tail=tail,
        transform=transform,
        needs_grad=True,
        reduced=reduced,
        grad=student,
    )
    return loss, stats


@sparse_distillation_rows_.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return row_operator.empty_outputs(student, False, others[-2])[:2]


def _backward(ctx: Any, upstream: Tensor | None, _stats: None, _grad: None) -> tuple[Tensor | None, ...]:
    return row_operator._backward(ctx, upstream, None, None)[0], *(None,) * 15


sparse_distillation_rows.register_autograd(_backward, setup_context=row_operator._setup_context)
