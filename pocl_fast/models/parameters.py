"""A model's parameters: how many they are, made ready to train, and gathered where they are spread over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.probing import found_of, is_sharded
from pocl_fast.system.errors import InputError

CHECKPOINTED = "_checkpoint_wrapped_module."  # in the names under FSDP's activation checkpointing


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


@contextlib.contextmanager
def unsharded(model: Any) -> Iterator[Any]:
    """A context that gives every rank the whole of a model, for work that is not training: a plain one with `model`'s
    weights. Every rank must enter and leave it; within, each runs the model independently of the others.

    A model that is whole is given as it is; under FSDP2 and ZeRO-3 a copy is made, which takes one model's memory.
    Raises `InputError` for what cannot be gathered: FSDP1, and adapters under FSDP or ZeRO-3.
    """
    plain = causal_lm(model)
    parameters = dict(plain.named_parameters())
    if is_sharded(plain) and plain is not model and hasattr(model, "get_base_model"):
        raise InputError('adapters cannot be evaluated under FSDP or ZeRO-3: give eval_strategy="no"')
    if any(hasattr(parameter, "full_tensor") for parameter in parameters.values()):
        yield _copy(plain, {name.replace(CHECKPOINTED, ""): parameter for name, parameter in parameters.items()})
    elif any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            whole = _copy(plain, parameters)
        yield whole  # the model itself would put its weights away after their first use
    elif type(model).__name__ == "FullyShardedDataParallel":
        raise InputError('FSDP1 cannot be evaluated: give fsdp_config={"version": 2}')
    else:
        yield plain


@torch.no_grad()
def _copy(model: Any, parameters: dict[str, nn.Parameter]) -> Any:
    from torch.distributed.fsdp import FSDPModule

    first = next(iter(parameters.values()))
    # the model's own class: FSDP2 puts two before it, and transformers' makers would cut the copy up for ZeRO-3
    kind = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    default = torch.get_default_dtype()
    torch.set_default_dtype(first.dtype)
    try:  # the first values, which nobody sees, are not to move our generators
        with torch.random.fork_rng([first.device] if first.device.type == "cuda" else []), torch.device(first.device):
            copy: Any = kind(model.config)
    finally:
        torch.set_default_dtype(default)
    vars(copy)["_found_by_pocl_fast"] = found_of(model)
    for name, into in copy.named_parameters():
        weight: Any = parameters[name]
        into.copy_(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)
    return copy.eval()
