"""Cutting a smaller model out of a larger one, by keeping some of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pocl_fast.system.errors import InputError


def evenly_spaced_layers(num_layers: int, keep: int) -> list[int]:
    """Which layers a cut model of `keep` layers takes: the first, the last, and the others evenly between them.

    The first layers read the embeddings and the last ones write for the lm_head, so both ends must stay for the cut
    model to speak at all; residual layers in between refine one stream, so an even choice loses least of any one step
    (DistilBERT's initialisation, arXiv 1910.01108 section 3).
    """
    if not 1 <= keep <= num_layers:
        raise InputError(f"--student-layers {keep}: the model to cut from has {num_layers} layers")
    if keep == 1:
        return [0]
    return [round(i * (num_layers - 1) / (keep - 1)) for i in range(keep)]


def cut_layers(model: Any, keep: int) -> Any:
    """A copy of a transformers causal language model with `keep` of its layers (see `evenly_spaced_layers`) and
    everything else, embeddings, final norm and lm_head, as it is."""
    stack_name, stack = _layer_stack(model)
    chosen = evenly_spaced_layers(len(stack), keep)
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers = keep
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[i] for i in chosen]
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(stack_name + "."):
            weights[name] = tensor
            continue
        layer, rest = name[len(stack_name) + 1 :].split(".", 1)
        if int(layer) in chosen:
            weights[f"{stack_name}.{chosen.index(int(layer))}.{rest}"] = tensor
    smaller = type(model)(config).to(next(model.parameters()).dtype)
    smaller.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, strict=True)
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller.to(next(model.parameters()).device).eval()


def _layer_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's transformer layers."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(f"cannot cut layers from {type(model).__name__}: no list of {count} layers found in it")


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def as_trainable(model: Any) -> Any:
    """The model with fp32 weights, all of them requiring a gradient: what the optimizer's small steps need."""
    return model.to(torch.float32).requires_grad_(True)
