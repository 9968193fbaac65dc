"""Short random tokens on which a model is tried before it is used, and contexts that leave it as it was.

Knows transformers' configurations. Does not know what is tried.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.models.placement import input_device
from pocl_fast.system.fp32_products import fp32_products

SHORT_WINDOW = 6  # tokens; what windows and chunks are cut to, where they are longer than a probe
LONGEST_WINDOW = 64  # tokens; a window up to this is left as it is: a probe is two of them long
WINDOWS = "window|attention_chunk|local_attention"  # in the names of their numbers
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)  # the device's own, which say nothing of a model


def found_of(model: nn.Module) -> dict[Any, Any]:
    """What was found by trying a model out, by what was tried and in which circumstances. It is kept with the model,
    and shared with whole copies of one that is spread over ranks, so that each thing is tried and said once."""
    found: dict[Any, Any] = vars(model).setdefault("_found_by_pocl_fast", {})
    return found


def say_once(model: nn.Module, sentence: str, say: Callable[[str], object] | None) -> None:
    """Tells `say` something of a model, unless it was said of it before."""
    said = found_of(model).setdefault("said", set())
    if say is not None and sentence not in said:
        say(sentence)
        said.add(sentence)


def circumstances(model: Any) -> tuple[Any, ...]:
    """In what a model runs now: its attention, its device, its dtype and autocast's."""
    device = input_device(model)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return getattr(model.config, "_attn_implementation", None), device, model.dtype, autocast


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it all modules are in evaluation mode; after it each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn within it changes no later random number."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def positions_of(config: Any) -> int:
    """The most tokens a model has positions for, by its configuration."""
    settings = config.get_text_config(decoder=True)
    found = getattr(settings, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 1 << 30


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where one is NaN and the other is not."""
    same = got == want  # -inf too
    largest = want.masked_fill(want.isinf(), 0).abs().max().clamp_min(1e-30)
    return float(((got - want).abs().masked_fill(same, 0).max() / largest).nan_to_num(float("inf")))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode and no gradient is kept; each module's mode and the random generators
    are as before afterwards."""
    with evaluating(model), same_random_numbers(input_device(model)), torch.no_grad():
        yield


@contextlib.contextmanager
def exact_arithmetic(model: nn.Module) -> Iterator[None]:
    """Within it products of fp32 weights are exact: no autocast, and no mode that rounds their inputs."""
    kind = input_device(model).type
    with torch.autocast(kind, enabled=False), fp32_products("ieee"):
        yield


@contextlib.contextmanager
def plain_run(model: Any) -> Iterator[None]:
    """Within it an undisturbed model runs by its family's own attention, as exactly as its weights allow."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(attending_by(model, "eager"))
        if is_exact(model):
            stack.enter_context(exact_arithmetic(model))
        yield


def is_exact(model: Any) -> bool:
    """Whether `exact_arithmetic` makes all of a model's products exact: its weights are fp32 and not quantised."""
    if getattr(model, "is_quantized", False):
        return False
    if input_device(model).type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds a part of each weight alone (FSDP, ZeRO-3), so that the model does not run by itself."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


def placeable(model: Any) -> bool:
    """Whether a model may be moved to another device: it is not spread, quantised or sharded."""
    chosen = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return not chosen and not is_sharded(model)


def random_ids(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """[rows, length] tokens that mean nothing special to the model (as places of images do), on its input device."""
    configs = [model.config, model.config.get_text_config()]
    named = [item for config in configs for item in vars(config).items()]
    special = {value for name, value in named if re.search(r"token_(id|index)", name) and type(value) is int}
    named.append(("vocab_size", getattr(configs[1], "vocab_size", None)))  # a family may keep it under another name
    sizes = [value for name, value in named if name.startswith("vocab_size") and type(value) is int and value > 0]
    most = min([*sizes, 1 << 16])
    usable = torch.tensor([i for i in range(most) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(usable), (rows, length), generator=generator)
    return usable[chosen].to(input_device(model))


def windows_of(model: nn.Module) -> list[int]:
    """The windows and chunks of a model's attention and states, in tokens."""
    return [value for _, name, value in _numbers(model, WINDOWS + "|chunk_size") if "feed_forward" not in name]


def longest_window(model: nn.Module) -> int:
    """Tokens of the model's longest window or chunk of attention; 0 where it has none."""
    return max([value for _, _, value in _windows(model)], default=0)


@contextlib.contextmanager
def short_windows(model: nn.Module) -> Iterator[None]:
    """Within it windows and chunks that are longer than a probe are a few tokens, for the masks and for the layers, so
    that a short sample reaches beyond them."""
    long = [(owner, name, value) for owner, name, value in _windows(model) if value > LONGEST_WINDOW]
    try:
        for owner, name, _ in long:
            owner[name] = SHORT_WINDOW
        yield
    finally:
        for owner, name, value in long:
            owner[name] = value


def _windows(model: nn.Module) -> list[tuple[dict[str, Any], str, int]]:
    """Where a model's windows and chunks of attention are kept: in its configurations and its layers."""
    return _numbers(model, WINDOWS)


def _numbers(model: nn.Module, named: str) -> list[tuple[dict[str, Any], str, int]]:
    """Where the configurations and layers of a model keep whole numbers under such names, but for layers' numbers."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in list(configs.values()):
        if hasattr(config, "get_text_config"):
            configs.setdefault(id(text := config.get_text_config()), text)
    return [
        (vars(owner), name, value)
        for owner in (*configs.values(), *model.modules())
        for name, value in vars(owner).items()
        if re.search(named, name) and "layers" not in name and type(value) is int and value > 0
    ]


@contextlib.contextmanager
def attending_by(model: Any, implementation: str) -> Iterator[None]:
    """Within it the model attends in transformers' way of this name, where its family lets that be chosen."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_attn_implementation"):
            configs[id(config)] = config
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(implementation)
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
