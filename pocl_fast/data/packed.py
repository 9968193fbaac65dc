"""Padding-free batches: several samples one behind the other in a single row of tokens.

Knows how such a row is laid out, and the rectangles instead of it. Does not know models (models/packed_forward.py runs
one on a row) or losses.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl_fast.data.encoded import EncodedSample


class Rows(enum.IntEnum):
    """How a model is given the samples of a batch. True stands for PACKED and False for PADDED; as a condition, only
    PACKED is true."""

    PADDED = 0  # a rectangle, with padding behind the shorter ones
    PACKED = 1  # one row, without padding
    BY_LENGTH = 2  # a rectangle for each length, without padding

    def __bool__(self) -> bool:
        return self is Rows.PACKED


@dataclass(frozen=True)
class PackedBatch:
    """B samples in one row of T tokens, of which N are supervised (predict a response token)."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sample
    lengths: tuple[int, ...]  # B sample lengths; they add up to T
    supervised: Tensor  # [N] int64: positions whose next token is trained on
    labels: Tensor  # [N] int64: these next tokens
    counts: tuple[int, ...]  # supervised tokens of each sample; they add up to N

    def to(self, device: torch.device | str) -> PackedBatch:
        move = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "supervised", "labels")}
        return PackedBatch(lengths=self.lengths, counts=self.counts, **move)

    def part(self, chosen: Sequence[int]) -> tuple[PackedBatch, Tensor]:
        """A batch of some of the samples, and where its supervised positions are among this batch's N."""
        ids, positions = (x[0].split(self.lengths) for x in (self.input_ids, self.position_ids))
        labels = self.labels.split(self.counts)
        places = torch.arange(len(self.labels), device=self.labels.device).split(self.counts)
        starts = [sum(self.lengths[:i]) for i in chosen]
        supervised, start = [], 0
        for i, before in zip(chosen, starts, strict=True):
            supervised.append(self.supervised[places[i]] - before + start)
            start += self.lengths[i]
        part = PackedBatch(
            input_ids=torch.cat([ids[i] for i in chosen])[None],
            position_ids=torch.cat([positions[i] for i in chosen])[None],
            lengths=tuple(self.lengths[i] for i in chosen),
            supervised=torch.cat(supervised),
            labels=torch.cat([labels[i] for i in chosen]),
            counts=tuple(self.counts[i] for i in chosen),
        )
        return part, torch.cat([places[i] for i in chosen])


def pack(samples: Sequence[EncodedSample]) -> PackedBatch:
    """The samples one behind the other, in the order given. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("pack: no samples")
    input_ids: list[int] = []
    position_ids: list[int] = []
    supervised: list[int] = []
    labels: list[int] = []
    for sample in samples:
        ids, first = sample.ids, len(input_ids)
        for start, end in sample.spans:
            supervised.extend(range(first + start - 1, first + end - 1))  # the token before predicts a token
            labels.extend(ids[start:end])
        input_ids.extend(ids)
        position_ids.extend(range(len(sample)))
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        lengths=tuple(len(sample) for sample in samples),
        supervised=torch.tensor(supervised),
        labels=torch.tensor(labels),
        counts=tuple(sample.supervised_count for sample in samples),
    )


def token_budget_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Positions in `lengths` grouped so that each group's sum stays within `max_tokens` (one longer item stands alone).

    Longest first, so that the peak of memory comes at the start and not at the end.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    used = 0
    for i in order:
        if not batches or used + lengths[i] > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += lengths[i]
    return batches


def padded_kwargs(batch: PackedBatch) -> tuple[dict[str, Any], Tensor]:
    """The arguments with which a model runs on a batch as a right-padded rectangle [B, longest], and where its
    supervised positions are in the flattened one. Samples of one length need no mask, and get none."""
    device, longest = batch.input_ids.device, max(batch.lengths)
    lengths = torch.tensor(batch.lengths, device=device)
    rows = torch.arange(len(batch.lengths), device=device).repeat_interleave(lengths)
    places = rows * longest + batch.position_ids[0]
    ids = torch.zeros(len(batch.lengths) * longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    ids[places] = batch.input_ids[0]
    mask[places] = 1
    shape = (len(batch.lengths), longest)
    padding = {} if min(batch.lengths) == longest else {"attention_mask": mask.view(shape)}
    return {"input_ids": ids.view(shape), **padding, "use_cache": False}, places[batch.supervised]
