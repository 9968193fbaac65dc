"""How many parameters a model has, and its weights made ready to train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def num_parameters(model: nn.Module, *, adapters: bool = True) -> int:
    """Parameters of a model, tied ones once, those packed into 4 bits as many as they were; without peft's adapters
    unless `adapters`."""
    left_out = set() if adapters else {id(p) for p in _adapter_weights(model)}
    return sum(_count(p) for p in {id(p): p for p in model.parameters()}.values() if id(p) not in left_out)


def _adapter_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of all kinds of adapters: each layer of peft's names its parts that hold them."""
    for layer in model.modules():
        for name in getattr(layer, "adapter_layer_names", ()):
            part = getattr(layer, name, None)
            if isinstance(part, nn.Parameter):
                yield part
            elif isinstance(part, nn.Module):
                yield from part.parameters()


def _count(weight: Any) -> int:
    if type(weight).__name__ == "Params4bit":  # of bitsandbytes: two weights a byte of its storage
        return int(weight.numel()) * weight.element_size() * 2
    return int(getattr(weight, "ds_numel", weight.numel()))  # ZeRO-3's own parts are empty


def as_trainable(model: Any) -> Any:
    """The model with fp32 weights, all of them requiring a gradient: what the optimizer's small steps need."""
    return model.to(torch.float32).requires_grad_(True)
