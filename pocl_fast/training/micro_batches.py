"""The micro-batches of a schedule as a torch dataset, each found by its step and its number within the step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset, Sampler

from pocl_fast.curriculum.schedule import Place, Schedule
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import PackedBatch, pack


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The samples of one forward and backward on one rank."""

    samples: list[EncodedSample]  # empty where the step has fewer samples than micro-batches
    packed: PackedBatch  # of the samples; without any, a row with nothing supervised
    place: Place
    live: bool = False  # whether the responses are the student's own

    def with_samples(self, samples: list[EncodedSample], *, live: bool) -> MicroBatch:
        """The same micro-batch of other samples."""
        return replace(self, samples=samples, packed=pack(samples) if samples else self.packed, live=live)

    def pieces(self, count: int) -> list[MicroBatch]:
        """Cut into `count` micro-batches of nearly as many samples each, or into single samples."""
        if count == 1 or len(self.samples) < 2:
            return [self]
        bounds = [len(self.samples) * i // count for i in range(count + 1)]
        cut = [self.samples[a:b] for a, b in itertools.pairwise(bounds) if a < b]
        return [self.with_samples(part, live=self.live) for part in cut]


class MicroBatches(Dataset[MicroBatch]):
    """The micro-batches of one rank."""

    def __init__(self, schedule: Schedule, samples: Mapping[int, EncodedSample], rank: int) -> None:
        self.schedule, self.samples, self.rank = schedule, samples, rank

    def __len__(self) -> int:
        return self.schedule.planned_total * self.schedule.size.accumulation

    def __getitem__(self, at: tuple[int, int]) -> MicroBatch:
        """Micro-batch `part` of a step; `at` is (step, part)."""
        step, part = at
        indices = self.schedule.batch(step, part, self.rank)
        chosen = [self.samples[index] for index in indices]
        packed = pack(chosen) if chosen else _nothing(next(iter(self.samples.values())))
        return MicroBatch(chosen, packed, self.schedule.place(step))


class Numbers(Sampler[list[tuple[int, int]]]):
    """(step, part) of every micro-batch, in order, to the end that the schedule has when it is reached."""

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


def _nothing(sample: EncodedSample) -> PackedBatch:
    """A batch for a rank without samples: something to run the model on, and nothing supervised."""
    packed = pack([sample])
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(packed.input_ids, packed.position_ids, packed.lengths, none, none, (0,))
