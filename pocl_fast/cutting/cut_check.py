"""Whether a cut model is its source without the other layers: what its layers are, and what logits it gives.

Knows transformers' models as modules. Does not know configurations (cut_settings.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.models.probing import DEVICE_ERRORS, LONGEST_WINDOW, apart, positions_of, random_ids, windows_of
from pocl_fast.system.errors import InputError, first_line

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}  # of logits, relative to the largest, by the weights' dtype
TOLERANCE_HALF = 3e-2
TOKENS = 24  # of the sample that both models are given; more where a window is short
OF_THE_MOMENT = ("training", "gradient_checkpointing")  # settings of a module that no configuration says
SMALL = 50_000_000  # parameters; so small a model is also compared with other weights


def nature(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a layer is, but for its weights and its number: kinds and shapes of its parts, and their plain settings."""
    kinds: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, module in layer.named_modules():
        prefix = f"{name}." if name else ""
        kinds[f"{prefix}class"] = type(module).__name__
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            kinds[prefix + own] = None if tensor is None else tuple(tensor.shape)
        for own, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not (own.startswith("_") or own in OF_THE_MOMENT):
                settings[prefix + own] = value
    numbers = [name for name in settings if {"idx", "index", "id"} & set(name.rpartition(".")[2].split("_"))]
    return kinds, {name: value for name, value in settings.items() if name not in numbers}


def differences(got: nn.Module, want: nn.Module) -> tuple[list[str], list[str]]:
    """How a layer differs from another in its kinds and shapes, and how in its settings."""
    kinds, settings = (
        [f"{name} is {a.get(name)}, right {b.get(name)}" for name in {**b, **a} if a.get(name) != b.get(name)]
        for a, b in zip(nature(got), nature(want), strict=True)
    )
    return kinds, settings


class StudentFails(Exception):
    """A cut model raised where its source did not."""


class StatesUnknown(Exception):
    """It cannot be told what a layer does to its hidden states."""


def logits_apart(source: Any, layers: Sequence[nn.Module], dropped: Sequence[int], cut: Any) -> float:
    """The largest difference between the logits of a cut model and those of its source, whose dropped layers pass on
    what they are given; relative to the largest logit, and infinite where a logit of one is NaN."""
    windows = [window for window in windows_of(source) if window <= LONGEST_WINDOW]
    count = min(max(TOKENS, max(windows, default=0) + 8), positions_of(source.config))
    tokens = random_ids(source, 1, count)
    with passed_over([layers[i] for i in dropped]):
        want = _logits(source, tokens)
    if isinstance(want, str):
        name = type(source).__name__
        raise InputError(f"cannot cut layers from {name}: it does not run on {count} tokens ({want})")
    got = _logits(cut, tokens)
    if isinstance(got, str):
        raise StudentFails(f"the cut model does not run ({got})")
    return apart(got, want)


def _logits(model: Any, tokens: Tensor) -> Tensor | str:
    """A model's logits; where its own code raises, what it says."""
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    except DEVICE_ERRORS:
        raise
    except Exception as failure:
        return first_line(failure, named=True)
    return logits.float()


@contextlib.contextmanager
def passed_over(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these layers pass on the hidden states that they are given."""
    hooks = [layer.register_forward_hook(_pass_on, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pass_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given, _ = states_of(layer, args, kwargs, output)
    if not isinstance(output, (tuple, list)):
        return given
    passed = [given, *output[1:]]
    return output._make(passed) if hasattr(output, "_make") else type(output)(passed)


def states_of(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
    """The hidden states that a layer was given, and those that it gave. Raises `StatesUnknown` where none of what it
    was given has the shape of what it gave."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.shape == hidden.shape and value.is_floating_point():
            return value, hidden
    raise StatesUnknown(f"its {type(layer).__name__} is not given hidden states of the shape of its output")


def tolerance(model: Any) -> float:
    """How far rounding may move logits."""
    return TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE_HALF)


def with_large_weights(model: Any) -> Any:
    """A copy of a model with large random weights, so that every layer and position shows in its logits: at the weights
    that training begins with, attention is nearly even. Other parameters are moved a little."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in copied.modules():
            for name, weight in module._parameters.items():
                if weight is None or not weight.is_floating_point() or not weight.numel():
                    continue
                noise = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
                if name in ("weight", "gate_up_proj", "down_proj") and weight.dim() > 1:
                    weight.copy_(noise * (1.5 / min(weight.shape[-2:]) ** 0.5))
                else:
                    weight.add_(noise * 0.02)
    return copied
