"""Linear layers that train on a CPU with products of bf16: weights, activations and gradients stay fp32, and the inputs
and results of their matrix products are rounded, as autocast rounds them on a GPU.

torch's own autocast rounds attention too, whose bf16 gradient takes 3.5 times as long as fp32's on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.models.frozen import plain_linears


@contextlib.contextmanager
def rounded_linears(model: nn.Module) -> Iterator[None]:
    """Within it the model's `plain_linears` multiply in bf16, forward and on the way back: call backward within it too.
    Layers whose weights lie on several ranks stay as they are."""
    changed = [module for module in plain_linears(model) if _is_whole(module.weight)]
    for module in changed:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_whole(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and not hasattr(weight, "ds_id")  # FSDP's are DTensors, DeepSpeed's have an id


def _forward(module: nn.Linear, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
    if x.dtype != torch.float32:
        return nn.functional.linear(x, module.weight, module.bias)
    y: Tensor = _RoundedProduct.apply(x, module.weight)
    return y if module.bias is None else y + module.bias


class _RoundedProduct(torch.autograd.Function):
    """x · weightᵀ, fp32. What is rounded is rounded anew on the way back: kept copies of the weights would take half of
    their memory, and all rounding takes 6 % of a step of a small model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        of_x, of_weight = ctx.needs_input_grad  # under adapters most layers need one
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return nn.functional.linear(x.bfloat16(), weight.bfloat16()).float()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        rounded = grad.bfloat16()
        rows = rounded.reshape(-1, grad.shape[-1])
        x_grad = (rounded @ weight.bfloat16()).float() if of_x else None
        weight_grad = (rows.t() @ x.reshape(-1, x.shape[-1]).bfloat16()).float() if of_weight else None
        return x_grad, weight_grad
