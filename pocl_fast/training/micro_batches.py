"""The micro-batches of a schedule as a torch dataset, each found by its step and its number in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from pocl_fast.curriculum.schedule import Schedule
from pocl_fast.data.encoding import EncodedSample
from pocl_fast.data.packed import PackedBatch, pack

# "samples": list[EncodedSample], "packed": PackedBatch, "place": Place; "live": the samples are the student's own
MicroBatch = dict[str, Any]


class MicroBatches(Dataset[MicroBatch]):
    """What one rank has of each step."""

    def __init__(self, schedule: Schedule, samples: Mapping[int, EncodedSample], rank: int) -> None:
        self.schedule, self.samples, self.rank = schedule, samples, rank

    def __len__(self) -> int:
        return self.schedule.planned_total * self.schedule.size.accumulation

    def __getitem__(self, at: tuple[int, int]) -> MicroBatch:
        """Of (step, part)."""
        step, part = at
        indices = self.schedule.batch(step, part, self.rank)
        chosen = [self.samples[index] for index in indices]
        packed = pack(chosen) if chosen else _nothing(next(iter(self.samples.values())))
        return {"samples": chosen, "packed": packed, "place": self.schedule.place(step), "live": False}


class Numbers(Sampler[list[tuple[int, int]]]):
    """(step, part) of every micro-batch, in order; ends where the schedule ends at the time."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.most_steps * self.schedule.size.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = 0
        while step < self.schedule.total_steps:
            for part in range(self.schedule.size.accumulation):
                yield [(step, part)]
            step += 1


def with_samples(batch: MicroBatch, samples: list[EncodedSample], *, live: bool) -> MicroBatch:
    """A micro-batch with others in its samples' place."""
    return {**batch, "samples": samples, "packed": pack(samples) if samples else batch["packed"], "live": live}


def pieces(batch: MicroBatch, count: int) -> list[MicroBatch]:
    """A micro-batch cut into `count` of nearly as many samples each, or into single ones."""
    samples = batch["samples"]
    if count == 1 or len(samples) < 2:
        return [batch]
    bounds = [len(samples) * i // count for i in range(count + 1)]
    cut = [samples[a:b] for a, b in itertools.pairwise(bounds) if a < b]
    return [with_samples(batch, part, live=batch["live"]) for part in cut]


def _nothing(sample: EncodedSample) -> PackedBatch:
    """A batch for a rank without samples: something to run the model on, and nothing supervised."""
    packed = pack([sample])
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(packed.input_ids, packed.position_ids, packed.lengths, none, none, (0,))
