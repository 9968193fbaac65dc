"""The torch operator behind a loss whose teacher is K entries a token (`TopKTeacher`): the sparse half of `ops.py`.

Checks nothing that the public functions have checked. On a CPU the C++ binding looks at the indices; on a GPU nobody
does, for that would wait for it: a kernel run with TRITON_DEBUG=1 stops at one that is outside the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocl_fast import ops

TAILS = ("bucket", "renormalise")  # what D makes of the entries that are not listed: one more outcome, or nothing


@torch.library.custom_op("pocl_fast::sparse_distillation_rows", mutates_args=())
def sparse_distillation_rows(
    student: Tensor,  # [N, V], last dimension contiguous
    log_probs: Tensor,  # [N, K] at temperature 1; −inf: no entry
    indices: Tensor,  # [N, K] int32 or int64, distinct in a row; not looked at where log_probs is −inf
    labels: Tensor,  # [N] int32 or int64
    temperature: Tensor,  # [1] or [N] fp32
    alpha: Tensor,  # [1] or [N] fp32
    row_scale: Tensor,  # [N] fp32: token weight over the divisor, folded into loss and gradient
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    tail: str,  # one of TAILS
    transform: list[float],  # scale and softcap (0: none) of the student
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled loss of each token [N] fp32; the rows of `reference.Rows`, unscaled, [7, N] fp32; and the gradient of
    the losses' sum [N, V], empty unless `needs_grad`."""
    tensors = (student, log_probs, indices, labels, temperature, alpha, row_scale)
    settings = (divergence, teacher_share, temperature_power, ignore_index, tail, transform)
    return _run(backend, tensors, settings, needs_grad)


@sparse_distillation_rows.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_grad, _backend = others
    return ops.empty_outputs(student, needs_grad)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The first two of `sparse_distillation_rows`; the gradient takes the place of the logits in `student`. Autograd
    learns of it by `ops.with_gradient`."""
    tensors = (student, log_probs, indices, labels, temperature, alpha, row_scale)
    settings = (divergence, teacher_share, temperature_power, ignore_index, tail, transform)
    loss, stats, _ = _run(backend, tensors, settings, True, grad=student)
    return loss, stats


@sparse_distillation_rows_.register_fake
def _(student: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor]:
    return ops.empty_outputs(student, False)[:2]


def _run(
    backend: str,
    tensors: tuple[Tensor, ...],
    settings: tuple[str, float, int, int, str, list[float]],
    needs_grad: bool,
    grad: Tensor | None = None,  # where the gradient goes; None: memory of its own
) -> tuple[Tensor, Tensor, Tensor]:
    """What `sparse_distillation_rows` gives, by a backend."""
    divergence, teacher_share, temperature_power, ignore_index, tail, transform = settings
    stats, grad = ops.backend_module(backend, "sparse").sparse_distillation_rows(
        *tensors,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        tail=tail,
        transform=transform,
        needs_grad=needs_grad,
        grad=grad,
    )
    labels, row_scale = tensors[3], tensors[6]
    return ops.scaled_losses(stats, labels, row_scale, ignore_index), stats, grad


def _backward(ctx: Any, upstream: Tensor | None, _stats: None, _grad: None) -> tuple[Tensor | None, ...]:
    return ops._backward(ctx, upstream, None, None)[0], *(None,) * 14


sparse_distillation_rows.register_autograd(_backward, setup_context=ops._setup_context)
