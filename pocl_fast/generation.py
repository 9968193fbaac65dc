"""Answers to prompts: batched decoding that keeps the longest prompts together and drops answers as they finish."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Progress = Callable[[int], None]  # called with how many prompts were answered since the last call


def generation_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of the prompts in batches of similar length, longest first."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The model's answer to each prompt, as token ids without the end token.

    `temperature` 0 is greedy; otherwise sampling from the whole distribution (top-p 1) with `seed`. Answers are cut at
    `max_new_tokens`. Prompts are token ids and must not be empty.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    for number, batch in enumerate(generation_batches(prompts, batch_size)):
        generator = torch.Generator(device=device).manual_seed(seed * 1_000_003 + number) if temperature > 0 else None
        rows = _decode([prompts[i] for i in batch], model, max_new_tokens, set(end_ids), pad_id, temperature, generator)
        for i, row in zip(batch, rows, strict=True):
            answers[i] = row
        if progress:
            progress(len(batch))
    return answers


def _decode(
    prompts: Sequence[Sequence[int]],
    model: Any,
    max_new_tokens: int,
    end_ids: set[int],
    pad_id: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)
    cache_name = _cache_argument(model)
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        )
        chosen = _choose(output.logits[:, -1], temperature, generator)
        stay = []
        for row, token in enumerate(chosen.tolist()):
            if token not in end_ids:
                answers[active[row]].append(token)
                stay.append(row)
        if not stay:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if len(stay) < len(active):  # finished answers leave the batch
            kept = torch.tensor(stay, device=device)
            cache.batch_select_indices(kept)
            tokens, positions, mask = tokens[kept], positions[kept], mask[kept]
            active = [active[row] for row in stay]
    return answers


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _cache_argument(model: Any) -> str:
    """transformers renamed the argument `past_key_values` to `cache` within version 5."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
