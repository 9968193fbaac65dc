"""What trying a model out needs: evaluation mode and random numbers as they were, sizes that a sample should pass, and
how far two logits are apart.

Knows modules and configurations. Does not know what is tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


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


def windows_of(config: Any) -> list[int]:
    """The windows and chunks of attention in a configuration, in tokens: its numbers with such a name."""
    settings = vars(config.get_text_config(decoder=True))
    return [
        value
        for name, value in settings.items()
        if ("window" in name or "chunk_size" in name) and "layers" not in name and "feed_forward" not in name
        if type(value) is int and value > 0
    ]


def positions_of(config: Any) -> int:
    """The most tokens a model has positions for, by its configuration."""
    settings = config.get_text_config(decoder=True)
    found = getattr(settings, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 1 << 30


def plain_tokens(config: Any, *shape: int) -> Tensor:
    """Random token ids, the same at each call, but those with a meaning of their own: padding, ends, pictures."""
    text = config.get_text_config(decoder=True)
    own = {
        value
        for settings in (vars(config), vars(text))
        for name, value in settings.items()
        if "token" in name and ("id" in name or "index" in name) and type(value) is int
    }
    tokens = torch.randint(0, int(text.vocab_size), shape, generator=torch.Generator().manual_seed(0))
    plain = next(token for token in range(int(text.vocab_size)) if token not in own)
    return torch.where(torch.isin(tokens, torch.tensor(sorted(own) or [-1])), plain, tokens)


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where one is NaN and the other is not."""
    same = got == want  # -inf too
    error = (got - want).abs().masked_fill(same, 0).max() / want.masked_fill(want.isinf(), 0).abs().max().clamp_min(
        1e-6
    )
    return float(error.nan_to_num(float("inf")))
