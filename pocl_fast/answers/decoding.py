"""Answers to prompts with torch: batched decoding of prompts of similar length; finished answers leave their batch.

The prefix that all prompts have in common (a template's beginning) is computed once. Knows tokens, models and ranks.
Does not know what the answers are for.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocl_fast.models.frozen import frozen_linears
from pocl_fast.system import ranks
from pocl_fast.system.console import Report

BLOCK = 256  # tokens of the vocabulary in a block of `choose`
CPU_STEP_ROWS = 16  # a CPU takes as long for a decoding step of fewer rows: so much does one batch more cost
SHORTEST_PREFIX = 8  # tokens; a shorter common prefix is not worth a pass of its own


def generation_batches(
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int = 0,
    batch_tokens: int | None = None,
    most_padding: int | None = None,
) -> list[list[int]]:
    """Indices of the prompts in batches of similar length, longest first: at most `batch_size` prompts, whose cache
    takes at most `batch_tokens` tokens should each answer have `max_new_tokens` (a prompt over that stands alone), and
    which are padded by at most `most_padding` tokens in all."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        row = len(prompts[order[start]]) + max_new_tokens  # the longest: all are padded to it
        rows = batch_size if batch_tokens is None else max(1, min(batch_size, batch_tokens // row))
        batch = order[start : start + rows]
        if most_padding is not None:
            gaps = accumulate(len(prompts[batch[0]]) - len(prompts[i]) for i in batch)
            batch = batch[: sum(padding <= most_padding for padding in gaps)]
        batches.append(batch)
        start += len(batch)
    return batches


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
    sample_ids: Sequence[int] | None = None,
    forbidden_ids: Sequence[int] = (),
    batch_size: int = 64,
    batch_tokens: int | None = None,
    shared: bool = False,
    progress: Report | None = None,
) -> list[list[int]]:
    """The model's answer to each prompt, as token ids without the end token.

    `temperature` 0 is greedy; otherwise each answer is sampled from the whole distribution (top-p 1) with random
    numbers of its own, made from `seed` and its entry in `sample_ids` (its position where left out), so that it does
    not depend on the batch it is in. Answers are cut at `max_new_tokens`, and have none of `forbidden_ids`. Prompts are
    token ids and must not be empty.
    `batch_size` and `batch_tokens` are as in `generation_batches`; on a CPU a batch is cut, too, where its padding
    would take longer than the steps of one batch more. With `shared` every rank must call with the same arguments,
    answers its share of the batches, and has all answers at the end.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    ids = range(len(prompts)) if sample_ids is None else sample_ids
    on_cpu = next(model.parameters()).device.type == "cpu"
    batches = generation_batches(
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        most_padding=CPU_STEP_ROWS * max_new_tokens if on_cpu else None,
    )
    if shared:
        batches = [
            batches[i] for i in ranks.share([answering_work(prompts, batch, max_new_tokens) for batch in batches])
        ]
    with frozen_linears(model):
        decoder = _Decoder(model, prompts, max_new_tokens, set(end_ids), pad_id, temperature)
        decoder.forbidden = torch.tensor(list(forbidden_ids), dtype=torch.int64, device=decoder.device)
        for batch in batches:
            noise = _Noise(seed, [ids[i] for i in batch]) if temperature > 0 else None
            for i, row in zip(batch, decoder.decode([prompts[i] for i in batch], noise), strict=True):
                answers[i] = row
            if progress:
                progress(len(batch) * (ranks.world_size() if shared else 1))  # the others are about as far
    if shared:
        for theirs in ranks.gather({i: answers[i] for batch in batches for i in batch}):
            for i, row in theirs.items():
                answers[i] = row
    return answers


def answering_work(prompts: Sequence[Sequence[int]], batch: Sequence[int], max_new_tokens: int) -> float:
    """How much work a batch of these prompts may be, in tokens, so that ranks get equal shares."""
    return float(sum(len(prompts[i]) + max_new_tokens for i in batch))


class _Decoder:
    """Decodes batch after batch of prompts, whose common prefix is computed once."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: set[int],
        pad_id: int,
        temperature: float,
    ) -> None:
        self.model, self.max_new_tokens, self.end_ids = model, max_new_tokens, end_ids
        self.pad_id, self.temperature = pad_id, temperature
        self.device = next(model.parameters()).device
        self.forbidden = torch.empty(0, dtype=torch.int64, device=self.device)  # ids that are never chosen
        prefix = _common_prefix(prompts) if self._sees_all_tokens() else []
        self.prefix = list(prefix) if len(prompts) > 1 and len(prefix) >= SHORTEST_PREFIX else []
        self._prefix_cache: Any = None
        # transformers renamed the argument `past_key_values` to `cache` within version 5
        named = inspect.signature(type(model).forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"

    def decode(self, prompts: Sequence[Sequence[int]], noise: _Noise | None) -> list[list[int]]:
        """The answer to each of B prompts; `noise` chooses its tokens where it is sampled."""
        cache = self._cache_of_the_prefix(len(prompts))
        tokens, mask = self._padded(prompts)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, len(self.prefix) :]
        answers: list[list[int]] = [[] for _ in prompts]
        active = torch.arange(len(prompts), device=self.device)  # the rows that are still in the batch
        for _ in range(self.max_new_tokens):
            logits = self._forward(tokens, mask, positions, cache)
            if len(self.forbidden):
                logits = logits.index_fill(1, self.forbidden, -math.inf)
            rows = active.tolist()
            numbers = None if noise is None else noise.next(rows, logits.shape[1]).to(self.device)
            chosen = choose(logits, self.temperature, numbers)
            stay = []
            for row, (i, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token not in self.end_ids:
                    answers[i].append(token)
                    stay.append(row)
            if not stay:
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if len(stay) < len(active):  # finished answers leave the batch
                kept = torch.tensor(stay, device=self.device)
                cache.batch_select_indices(kept)
                tokens, positions, mask, active = tokens[kept], positions[kept], mask[kept], active[kept]
        return answers

    def _sees_all_tokens(self) -> bool:
        """Whether every layer attends to all tokens: in a window the padding between prefix and rest would count."""
        from pocl_fast.answers.kv_cache import RoomyLayer, roomy_cache  # imports transformers, which takes seconds

        return all(isinstance(layer, RoomyLayer) for layer in roomy_cache(self.model.config, 0).layers)

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] after the last of `tokens`, which are added to the cache."""
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: cache},
        )
        return output.logits[:, -1]

    def _cache_of_the_prefix(self, rows: int) -> Any:
        """A new cache for a batch, which holds the prefix in each of its rows."""
        from pocl_fast.answers.kv_cache import roomy_cache  # imports transformers, which takes seconds

        if not self.prefix:
            return roomy_cache(self.model.config, self.max_new_tokens)
        if self._prefix_cache is None:
            self._prefix_cache = roomy_cache(self.model.config, self.max_new_tokens)
            tokens = torch.tensor([self.prefix], device=self.device)
            places = torch.arange(len(self.prefix), device=self.device)[None]
            self._forward(tokens, torch.ones_like(tokens), places, self._prefix_cache)
        cache = copy.deepcopy(self._prefix_cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The tokens after the prefix, padded on their left to [B, longest]; and the mask of prefix and rest."""
        rests = [list(prompt[len(self.prefix) :]) for prompt in prompts]
        longest = max(map(len, rests))
        gaps = [longest - len(rest) for rest in rests]
        tokens = [[self.pad_id] * gap + rest for gap, rest in zip(gaps, rests, strict=True)]
        mask = [[1] * len(self.prefix) + [0] * gap + [1] * (longest - gap) for gap in gaps]
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)


def choose(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """The next token [B] by logits [B, V]: the most likely, or with `noise` [B, `numbers_a_token`] of Gumbel's
    distribution a sampled one: first a block of `BLOCK` tokens by the blocks' probabilities, then one of its tokens.

    The largest of log-probability + noise is chosen, which samples from these probabilities. Rounding changes the
    choice only where the two largest sums are as close as rounding; a cumulated probability would add its own error.
    """
    if noise is None:
        return logits.argmax(-1)
    B, V = logits.shape
    scores = torch.nn.functional.pad(logits.float() / temperature, (0, -V % BLOCK), value=-math.inf).view(B, -1, BLOCK)
    of_blocks, of_tokens = noise.split([scores.shape[1], BLOCK], dim=1)
    block = (scores.logsumexp(-1) + of_blocks).argmax(-1)
    inside = scores[torch.arange(B, device=logits.device), block]
    return block * BLOCK + (inside + of_tokens).argmax(-1)


def numbers_a_token(vocab_size: int) -> int:
    """How many random numbers `choose` takes for a token."""
    return -(-vocab_size // BLOCK) + BLOCK


class _Noise:
    """Random numbers of Gumbel's distribution: a counter-based stream for each seed and sample."""

    def __init__(self, seed: int, sample_ids: Sequence[int]) -> None:
        self._streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in sample_ids]

    def next(self, rows: Sequence[int], vocab_size: int) -> Tensor:
        """[rows, `numbers_a_token`] fp32 for the next token of each of these rows."""
        count = numbers_a_token(vocab_size)
        return torch.from_numpy(np.stack([self._streams[row].gumbel(size=count) for row in rows]).astype(np.float32))


def _common_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The tokens that all prompts begin with, but never a whole prompt: each keeps at least one token after them."""
    if not prompts:
        return []
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))  # in between, all agree where these two do
    limit = min(map(len, prompts)) - 1
    agree = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), limit)
    return low[: min(agree, limit)]
