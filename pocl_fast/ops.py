"""The torch operators behind the losses: one custom op that gives losses and gradient together, dispatched to a backend.

CPU tensors go to C++ (`pocl_fast._C`), CUDA and ROCm tensors to Triton (`pocl_fast.kernels`). Autograd lives here: the gradient
is computed with the loss, and backward only multiplies it by what comes in. Checks nothing that `losses.py` has checked.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

NUM_STATS = 7  # the fields of reference.Rows


@torch.library.custom_op("pocl_fast::distillation_rows", mutates_args=())
def distillation_rows(
    student: Tensor,  # [N, V_s], last dimension contiguous
    teacher: Tensor,  # [N, V_t], the same
    labels: Tensor,  # [N] int32 or int64
    temperature: Tensor,  # [1] or [N] fp32
    alpha: Tensor,  # [1] or [N] fp32
    row_scale: Tensor,  # [N] fp32: token weight over the divisor, folded into loss and gradient
    divergence: str,
    temperature_power: int,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled loss of each token [N], what else is known of it [7, N] (the rows of `reference.Rows`, unscaled; both fp32), and
    d Σ loss / d student [N, V_s] (empty unless `needs_grad`)."""
    rows = backend_module(backend).distillation_rows
    stats, grad = rows(
        student,
        teacher,
        labels,
        temperature,
        alpha,
        row_scale,
        divergence=divergence,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        needs_grad=needs_grad,
    )
    # an ignored row's loss is 0 whatever its weight
    return torch.where(labels == ignore_index, 0.0, stats[0] * row_scale), stats, grad


@distillation_rows.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,
    temperature_power: int,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    N, V = student.shape
    loss = student.new_empty((N,), dtype=torch.float32)
    stats = student.new_empty((NUM_STATS, N), dtype=torch.float32)
    return loss, stats, student.new_empty((N, V) if needs_grad else (0,))


@torch.library.custom_op("pocl_fast::scale_rows", mutates_args=("grad",))
def scale_rows(grad: Tensor, upstream: Tensor, backend: str) -> None:
    """Multiplies `grad` [N, V] in place by `upstream` [N]; touches no row whose factor is 1."""
    backend_module(backend).scale_rows_(grad, upstream)


@scale_rows.register_fake
def _(grad: Tensor, upstream: Tensor, backend: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.needs_grad, ctx.backend = inputs[-2], inputs[-1]
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, upstream: Tensor, _stats: Tensor, _grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused distillation loss can be differentiated once: its gradient is computed with it and is not itself"
            " differentiable. For create_graph=True use backend='reference'"
        )
    nothing = (None,) * 10
    if not ctx.needs_grad:
        return None, *nothing
    try:
        (grad,) = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "backward was called twice through one fused distillation loss, whose only gradient buffer the first call has"
            " scaled; compute the loss again, or add the losses and call backward once"
        ) from error
    if torch.compiler.is_compiling() or grad.is_cuda or not bool((upstream == 1).all()):  # on a CPU looking is free
        scale_rows(grad, upstream.contiguous(), ctx.backend)
    return grad, *nothing


distillation_rows.register_autograd(_backward, setup_context=_setup_context)


def backend_module(backend: str) -> Any:
    """The module that implements `distillation_rows` and `scale_rows_` for a backend; an error that says how to get it."""
    if backend == "cpp":
        return _module("pocl_fast.cpp", "the C++ part of pocl_fast is not built: install the package (pip install -e .) with g++")
    return _module(
        "pocl_fast.kernels.dense", 'backend "triton" needs triton: pip install "pocl-fast[gpu]", or pass backend="reference"'
    )


def _module(name: str, hint: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{hint} ({error})") from error
