"""The steps of a whole training: which samples each step has on each rank, and its temperature and alpha.

Knows the curriculum, lengths and seeds. Does not know models. A step's place follows from its number alone, so that
every rank and every restart sees the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from pocl_fast.curriculum.competence import Competence, Draws
from pocl_fast.curriculum.stages import Curriculum, Stage


@dataclass(frozen=True)
class BatchSize:
    """Samples of a micro-batch, or tokens where `tokens` is given; and how many micro-batches make a step."""

    samples: int = 16
    tokens: int | None = None  # the most of a micro-batch, prompts included; a longer sample stands alone
    accumulation: int = 1
    ranks: int = 1

    @property
    def parts(self) -> int:
        return self.accumulation * self.ranks


@dataclass(frozen=True)
class Place:
    """Where an optimizer step stands. All counts are from 0."""

    stage: int
    epoch: int  # within the stage
    step: int  # within the epoch
    step_in_stage: int
    stage_steps: int  # of the stage in all, as planned
    epoch_steps: int
    passes: float  # over the samples, when the step is done, all stages before included: see `Schedule`

    @property
    def ends_epoch(self) -> bool:
        return self.step + 1 == self.epoch_steps

    @property
    def ends_stage(self) -> bool:
        return self.step_in_stage + 1 == self.stage_steps


@dataclass
class Schedule:
    """The Baby-Step schedule as optimizer steps: stage after stage, each `epochs` passes over its samples, or
    `stage_steps` steps, in an order that is shuffled by `seed` anew for each pass. With `competence`, which needs
    `stage_steps`, the samples are those of `Draws` in place of passes over the stage's, and a pass is as many steps as
    one over all samples takes.

    `lengths` gives each sample's tokens by its index; samples that the curriculum does not have are not used. A stage
    may be ended early (`end_stage`); the numbers of later steps move up, and what they draw stays.
    """

    curriculum: Curriculum
    lengths: dict[int, int]
    size: BatchSize
    seed: int = 42
    epochs: int = 8
    stage_steps: int | Sequence[int] | None = None  # every stage's, or each one's
    competence: Competence | None = None
    within_stage: Literal["constant", "linear"] = "constant"
    reorders: bool = False  # whether `reorder` may be called
    ended: dict[int, int] = field(default_factory=dict)  # stage -> steps after which it was ended
    # stage -> a new order, valid from there on
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    # (stage, epoch) -> what was computed of it
    _shuffled: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _boundaries: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        given = None if isinstance(self.stage_steps, int) else self.stage_steps
        if given is not None and (len(given) != len(self.stages) or min(given) < 1):
            raise ValueError(f"{len(self.stages)} stages need a positive number of steps each, got {list(given)}")
        if self.competence is not None and self.stage_steps is None:
            raise ValueError("competence needs stage_steps: it is a share of all steps")

    # -- steps ------------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.curriculum.stages

    def planned_steps(self, stage: int) -> int:
        """Steps of a stage that is not ended early."""
        if self.stage_steps is None:
            return int(self._ends(stage)[-1])
        return self.stage_steps if isinstance(self.stage_steps, int) else self.stage_steps[stage]

    def steps(self, stage: int) -> int:
        """Steps of a stage."""
        return self.ended.get(stage, self.planned_steps(stage))

    @property
    def total_steps(self) -> int:
        return sum(self.steps(stage.index) for stage in self.stages)

    @property
    def planned_total(self) -> int:
        return sum(self.planned_steps(stage.index) for stage in self.stages)

    @property
    def most_steps(self) -> int:
        """No fewer than there will be, whatever orders are still to come."""
        if self.reorders and self.size.tokens is not None and self.stage_steps is None:
            return self.epochs * sum(stage.size for stage in self.stages)  # a sample a step
        return self.total_steps

    def identity(self) -> dict[str, Any]:
        """All that decides which samples a step number has. Ranks and accumulation count by their product: a step has
        the same samples for the same product."""
        fixed = self.stage_steps
        return {
            "samples of a micro-batch": self.size.samples if self.size.tokens is None else None,
            "tokens of a micro-batch": self.size.tokens,
            "ranks x accumulated micro-batches": self.size.parts,
            "seed of the order": self.seed,
            "epochs of a stage": self.epochs if fixed is None else None,
            "steps of the stages": None
            if fixed is None
            else [self.planned_steps(stage.index) for stage in self.stages],
            "competence": None if self.competence is None else asdict(self.competence),
            "samples of the stages": [stage.size for stage in self.stages],
            "order of the samples": hashlib.sha256(self.curriculum.order.tobytes()).hexdigest()[:16],
        }

    def end_stage(self, stage: int, steps: int) -> None:
        """Ends a stage after this many of its steps."""
        self.ended[stage] = steps

    def reorder(self, stage: int, order: np.ndarray) -> None:
        """From this stage on the samples are ranked by `order`, easiest first; others than the curriculum's in it are
        passed over."""
        self._orders[stage] = order[np.isin(order, self.curriculum.order)]
        self._boundaries.clear()
        self._shuffled.clear()

    def place(self, step: int) -> Place:
        """Where optimizer step number `step` stands, from 0. Raises IndexError past the last."""
        within, passes = step, 0.0
        for stage in self.stages:
            if within < self.steps(stage.index):
                return self._place(stage.index, within, passes)
            within -= self.steps(stage.index)
            passes += self._passes(stage.index, self.steps(stage.index))
        raise IndexError(f"step {step} of {self.total_steps}")

    def _place(self, stage: int, within: int, passes: float) -> Place:
        epoch, first, count = self._epoch_of(stage, within)
        return Place(
            stage=stage,
            epoch=epoch,
            step=within - first,
            step_in_stage=within,
            stage_steps=self.planned_steps(stage),
            epoch_steps=min(count, self.planned_steps(stage) - first),
            passes=passes + self._passes(stage, within + 1),
        )

    def _passes(self, stage: int, steps: int) -> float:
        """Passes over a stage's samples in its first `steps` steps."""
        if not steps:
            return 0.0
        epoch, first, count = self._epoch_of(stage, steps - 1)
        return epoch + (steps - first) / count

    def _epoch_of(self, stage: int, within: int) -> tuple[int, int, int]:
        """The epoch that a step of a stage belongs to, that epoch's first step, and its number of steps."""
        ends = self._ends(stage, at_least=within + 1)
        epoch = int(np.searchsorted(ends, within, side="right"))
        first = int(ends[epoch - 1]) if epoch else 0
        return epoch, first, int(ends[epoch]) - first

    def _ends(self, stage: int, at_least: int = 0) -> np.ndarray:
        """The stage's number of steps at each epoch's end, for `epochs` epochs or for as many as `at_least` steps
        take."""
        if self.competence is not None:
            count = len(self._cuts(self.stages[-1].index, 0)) - 1
            return count * np.arange(1, max(1, -(-at_least // count)) + 1)
        if self.size.tokens is None:
            count = -(-self.stages[stage].size // (self.size.samples * self.size.parts))
            epochs = max(self.epochs, -(-at_least // count)) if self.stage_steps is not None else self.epochs
            return count * np.arange(1, epochs + 1)
        ends: list[int] = []
        epoch = 0
        while len(ends) < self.epochs if self.stage_steps is None else not ends or ends[-1] < at_least:
            ends.append((ends[-1] if ends else 0) + len(self._cuts(stage, epoch)) - 1)
            epoch += 1
        return np.array(ends)

    # -- samples ----------------------------------------------------------------------------------------------------

    def subset(self, stage: int) -> np.ndarray:
        """The sample indices of a stage, easiest first."""
        known = [at for at in self._orders if at <= stage]
        order = self._orders[max(known)] if known else self.curriculum.order
        return order[: self.stages[stage].size]

    def batch(self, step: int, part: int, rank: int = 0) -> list[int]:
        """The sample indices of micro-batch `part` of a step, on one rank; empty where the step has fewer samples than
        micro-batches."""
        chosen = self._samples(self.place(step))
        if self.size.parts == 1:
            return chosen
        return self._dealt(chosen)[part * self.size.ranks + rank]

    def _samples(self, place: Place) -> list[int]:
        """The sample indices of a step."""
        if self.competence is None:
            order = self._order(place.stage, place.epoch)
            cuts = self._cuts(place.stage, place.epoch)
            return order[cuts[place.step] : cuts[place.step + 1]].tolist()
        before = sum(self.planned_steps(stage) for stage in range(place.stage))
        return self.curriculum.order[self._draws.step(before + place.step_in_stage)].tolist()

    @cached_property
    def _draws(self) -> Draws:
        assert self.competence is not None  # the caller looks
        order, by_tokens = self.curriculum.order.tolist(), self.size.tokens is not None
        weights = [self.lengths[index] for index in order] if by_tokens else [1] * len(order)
        budget = (self.size.tokens or self.size.samples) * self.size.parts
        return Draws(self.competence, weights, budget, steps=self.planned_total, seed=self.seed)

    def _dealt(self, chosen: Sequence[int]) -> list[list[int]]:
        """A step's samples dealt to its micro-batches, the longest first to the one with the fewest tokens, so that no
        rank waits long for another."""
        parts: list[list[int]] = [[] for _ in range(self.size.parts)]
        tokens = [0] * len(parts)
        most = -(-len(chosen) // len(parts)) if self.size.tokens is None else len(chosen)
        for index in sorted(chosen, key=lambda i: (-self.lengths[i], i)):
            at = min((n for n in range(len(parts)) if len(parts[n]) < most), key=lambda n: (tokens[n], n))
            parts[at].append(index)
            tokens[at] += self.lengths[index]
        return parts

    def _order(self, stage: int, epoch: int) -> np.ndarray:
        """The stage's samples in the order of one epoch."""
        if (stage, epoch) not in self._shuffled:
            self._shuffled.clear()  # one at a time is asked for
            random = np.random.Generator(np.random.Philox(key=[self.seed, stage << 32 | epoch]))
            self._shuffled[stage, epoch] = random.permutation(self.subset(stage))
        return self._shuffled[stage, epoch]

    def _cuts(self, stage: int, epoch: int) -> np.ndarray:
        """Where the steps of an epoch begin in its order, and the end."""
        if self.size.tokens is None:
            count = self.stages[stage].size
            return np.append(np.arange(0, count, self.size.samples * self.size.parts), count)
        if (stage, epoch) not in self._boundaries:
            lengths = np.array([self.lengths[i] for i in self._order(stage, epoch).tolist()])
            self._boundaries[stage, epoch] = _budget_cuts(lengths, self.size.tokens * self.size.parts)
        return self._boundaries[stage, epoch]

    # -- settings ---------------------------------------------------------------------------------------------------

    def setting(self, place: Place) -> tuple[float, float]:
        """Temperature and alpha of a step: its stage's, or within a stage on a line to the next one's."""
        stage = self.stages[place.stage]
        if self.within_stage == "constant" or stage.index + 1 == len(self.stages):
            return stage.temperature, stage.alpha
        after, share = self.stages[stage.index + 1], place.step_in_stage / place.stage_steps
        return (
            stage.temperature + share * (after.temperature - stage.temperature),
            stage.alpha + share * (after.alpha - stage.alpha),
        )


def _budget_cuts(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Where to cut a row of samples so that each part's lengths add up to `budget` at most, longer ones alone."""
    ends = np.cumsum(lengths)
    cuts = [0]
    while cuts[-1] < len(lengths):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + budget, side="right"))))
    return np.array(cuts)
