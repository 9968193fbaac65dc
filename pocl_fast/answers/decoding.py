"""Answers to prompts with torch: batched decoding of prompts of similar length; finished answers leave their batch.

The prefix that all prompts have in common (a template's beginning) is computed once. Where that would change an answer
of a model, it is decoded another way (decoding_way.py). Knows tokens, models and ranks. Does not know what the answers
are for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocl_fast.answers.decoding_way import ALONE, Way, decoding_way, shares_prefix, slowness
from pocl_fast.answers.steps import SharedPrefix
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.models.packed_forward import length_limit
from pocl_fast.models.placement import input_device
from pocl_fast.system import ranks
from pocl_fast.system.console import Report, say

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
    token ids and must not be empty. `batch_size` and `batch_tokens` are as in `generation_batches`; on a CPU a batch is
    cut, too, where its padding would take longer than the steps of one batch more. With `shared` every rank must call
    with the same arguments, answers its share of the batches, and has all answers at the end.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    ids = range(len(prompts)) if sample_ids is None else sample_ids
    on_cpu = input_device(model).type == "cpu"
    decoder = _Decoder(model, prompts, max_new_tokens, set(end_ids), pad_id, temperature, shared)
    decoder.forbidden = torch.tensor(list(forbidden_ids), dtype=torch.int64, device=decoder.device)
    plan = decoder.plan(batch_size, batch_tokens, most_padding=CPU_STEP_ROWS * max_new_tokens if on_cpu else None)
    if shared:
        plan = [plan[i] for i in ranks.share([answering_work(prompts, batch, max_new_tokens) for _, batch in plan])]
    with decoder.frozen():
        for way, batch in plan:
            noise = _Noise(seed, [ids[i] for i in batch]) if temperature > 0 else None
            for i, row in zip(batch, decoder.decode([prompts[i] for i in batch], noise, way), strict=True):
                answers[i] = row
            if progress:
                progress(len(batch) * (ranks.world_size() if shared else 1))  # the others are about as far
    if shared:
        for theirs in ranks.gather({i: answers[i] for _, batch in plan for i in batch}):
            for i, row in theirs.items():
                answers[i] = row
    return answers


def answering_work(prompts: Sequence[Sequence[int]], batch: Sequence[int], max_new_tokens: int) -> float:
    """How much work a batch of these prompts may be, in tokens, so that ranks get equal shares."""
    return float(sum(len(prompts[i]) + max_new_tokens for i in batch))


class _Decoder:
    """Decodes batch after batch of prompts, in the way that is right for the model (see decoding_way.py)."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: set[int],
        pad_id: int,
        temperature: float,
        shared: bool,
    ) -> None:
        self.model, self.prompts, self.max_new_tokens, self.end_ids = model, prompts, max_new_tokens, end_ids
        self.pad_id, self.temperature = pad_id, temperature
        self.device = input_device(model)
        self.forbidden = torch.empty(0, dtype=torch.int64, device=self.device)  # ids that are never chosen
        self.limit = length_limit(model.config)
        self.way = decoding_way(model, pad_id, say if ranks.is_first() else None)
        if shared:  # all ranks must cut the same batches; models of two machines may differ in a rounding
            self.way = max(ranks.gather(self.way), key=slowness)
        prefix = _common_prefix(prompts) if len(prompts) > 1 else []
        shared_prefix = len(prefix) >= SHORTEST_PREFIX and shares_prefix(model, pad_id)
        self.prefix = SharedPrefix(prefix) if shared_prefix else None

    def plan(self, batch_size: int, batch_tokens: int | None, most_padding: int | None) -> list[tuple[Way, list[int]]]:
        """The batches of prompts by their indices, and in which way each is decoded."""
        long = [i for i, prompt in enumerate(self.prompts) if self._is_long(prompt)]
        way = ALONE if self.way.lengths == "any" else self.way
        plan = [(way, [i]) for i in sorted(long, key=lambda i: (-len(self.prompts[i]), i))]
        for same in self._that_share_batches(set(long)):
            batches = generation_batches(
                [self.prompts[i] for i in same],
                batch_size=1 if self.way.lengths == "single" else batch_size,
                max_new_tokens=self.max_new_tokens,
                batch_tokens=batch_tokens,
                most_padding=most_padding,
            )
            plan += [(self.way, [same[i] for i in batch]) for batch in batches]
        return plan

    def _is_long(self, prompt: Sequence[int]) -> bool:
        """Whether its frequencies of rotary embeddings may come to depend on its length."""
        return len(prompt) + self.max_new_tokens > self.limit

    def _that_share_batches(self, without: set[int]) -> list[list[int]]:
        """Indices of the prompts that may be in one batch, longest first."""
        others = [i for i in range(len(self.prompts)) if i not in without]
        if self.way.lengths != "equal":
            return [others]
        by_length: dict[int, list[int]] = {}
        for i in sorted(others, key=lambda i: -len(self.prompts[i])):
            by_length.setdefault(len(self.prompts[i]), []).append(i)
        return list(by_length.values())

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it the model's linear layers are frozen: see `frozen_linears`."""
        if self.way.cache != "roomy" and self.prompts:
            # RWKV changes its weights in the first forward after training; a copy must be of what they are then
            self._forward_of_one_token()
        with frozen_linears(self.model):
            yield

    def _forward_of_one_token(self) -> None:
        self.model(input_ids=torch.tensor([self.prompts[0][:1]], device=self.device), use_cache=False)

    def decode(self, prompts: Sequence[Sequence[int]], noise: _Noise | None, way: Way) -> list[list[int]]:
        """The answer to each of B prompts; `noise` chooses its tokens where it is sampled."""
        if self._is_long(prompts[0]):  # the frequencies of the longest sequence so far are kept until a short one comes
            self._forward_of_one_token()
        steps = way.steps(self.model, self.pad_id, self.max_new_tokens, self.prefix)
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the prompts that are still in the batch
        going = set(rows)  # those whose answer has not ended
        logits = steps.begin(prompts) if self.max_new_tokens else None
        for step in range(self.max_new_tokens):
            assert logits is not None
            if len(self.forbidden):
                logits = logits.index_fill(1, self.forbidden, -math.inf)
            numbers = None if noise is None else noise.next(rows, logits.shape[1]).to(self.device)
            chosen = choose(logits, self.temperature, numbers)
            for i, token in zip(rows, chosen.tolist(), strict=True):
                if i in going and token in self.end_ids:
                    going.discard(i)
                elif i in going:
                    answers[i].append(token)
            if not going or step == self.max_new_tokens - 1:
                break
            if way.leave and len(going) < len(rows):  # finished answers leave the batch
                kept = torch.tensor([place for place, i in enumerate(rows) if i in going], device=self.device)
                steps.keep(kept)
                rows, chosen = [i for i in rows if i in going], chosen[kept]
            logits = steps.add(chosen)
        return answers


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
