"""Linear layers whose weights do not change for a while, laid out once for the CPU's matrix products.

torch hands fp32 products to MKL, which on AMD processors runs at half of what oneDNN gets out of the same AVX-512
units, and oneDNN reorders a plain weight matrix on every call. Both end where oneDNN has its own copy of the weights.
On a GPU there is nothing to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

ROWS = 128  # what oneDNN plans its layout for; other numbers of rows lose nothing


@contextlib.contextmanager
def frozen_linears(model: nn.Module) -> Iterator[None]:
    """Within it the model's linear layers are frozen: see `freeze_linears`."""
    frozen = freeze_linears(model)
    try:
        yield
    finally:
        for module in frozen:
            del module.forward


def freeze_linears(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Gives each plain fp32 `nn.Linear` on the CPU a forward of its own over a copy of its weight, without gradients;
    returns these layers. `del layer.forward` makes one a plain layer again.

    Later changes to the weights are not seen. Inputs and outputs are fp32; with `dtype` bfloat16, for processors that
    multiply it, the copy, the inputs and the results are rounded to it. Frozen and quantised layers stay as they are.
    """
    frozen: list[nn.Module] = []
    if not torch.backends.mkldnn.is_available():
        return frozen
    for module in plain_linears(model):
        module.forward = _packed(module, dtype)  # type: ignore[method-assign, assignment]
        frozen.append(module)
    return frozen


def plain_linears(model: nn.Module) -> Iterator[nn.Linear]:
    """The model's fp32 `nn.Linear` layers on the CPU that have no forward of their own, as subclasses and frozen,
    quantised or rounded layers do."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            weight = module.weight
            if "forward" not in vars(module) and weight.device.type == "cpu" and weight.dtype == torch.float32:
                yield module


def drop_weights(frozen: Iterable[nn.Module]) -> None:
    """Frees the weights of frozen layers: from now on only their copies are used."""
    for module in frozen:
        module.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def _packed(module: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().to(dtype), ROWS)
    bias = None if module.bias is None else module.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "").float()

    return forward
