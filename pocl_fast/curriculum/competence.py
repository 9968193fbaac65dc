"""Competence-based pacing: the share of the samples, easiest first, that may be drawn grows with every step, and the
samples that a step draws among them.

Knows ranks in an order, lengths and seeds. Does not know stages. (Platanios et al. 2019, arXiv 1903.09848.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

STREAM = 1 << 62  # of random numbers, apart from those that shuffle passes


@dataclass(frozen=True)
class Competence:
    """c(t) = min(1, √(t (1 - c₀²) / T + c₀²)), the share of the samples that may be drawn at step t."""

    initial: float  # c₀
    full: float  # T as a share of all steps

    def share(self, done: float) -> float:
        """c where a share `done` of all steps is done."""
        return min(1.0, math.sqrt(done / self.full * (1 - self.initial**2) + self.initial**2))

    def allowed(self, done: float, samples: int) -> int:
        """How many of the easiest samples may be drawn then; at least one."""
        return min(samples, max(1, math.ceil(self.share(done) * samples - 1e-9)))


@dataclass
class Draws:
    """The samples of each step as ranks in the order, 0 the easiest: a function of the step's number and the seed.

    Drawn without replacement, as evenly as the growing share allows: in each unit of time since a sample came in, it is
    due once, at a random moment of that unit, and a step takes the samples that are due first. So two samples that came
    in together never differ by more than one draw; and once all are in and were so from the start, this is the shuffled
    pass. A step never has a sample twice: where fewer are allowed than it takes, it has these.

    `weights` are the samples' by rank, of which a step takes `budget` at most (a heavier sample alone): all 1 for a
    number of samples, their tokens for a number of tokens. Steps are drawn one after the other and kept, 8 bytes a
    sample drawn; a first look at a late step takes about 5 µs for each sample drawn before it.
    """

    competence: Competence
    weights: Sequence[int]
    budget: int
    steps: int  # of the whole training
    seed: int
    _drawn: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    _due: list[tuple[float, int]] = field(default_factory=list, init=False, repr=False)  # a heap: when, rank
    _units: list[float] = field(default_factory=list, init=False, repr=False)  # by rank: when its next unit begins
    _now: float = field(default=0.0, init=False, repr=False)  # when the last sample drawn was due

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.Philox(key=[self.seed, STREAM]))

    def allowed(self, step: int) -> int:
        """How many of the easiest samples this step may draw."""
        return self.competence.allowed(step / self.steps, len(self.weights))

    def step(self, step: int) -> np.ndarray:
        """The ranks that a step draws, [samples] int64."""
        while len(self._drawn) <= step:
            self._drawn.append(self._draw(len(self._drawn)))
        return self._drawn[step]

    def _draw(self, step: int) -> np.ndarray:
        for rank in range(len(self._units), self.allowed(step)):
            self._units.append(self._now)
            self._put(rank)
        chosen: list[int] = []
        weight = 0
        while self._due:
            due, rank = self._due[0]
            weight += self.weights[rank]
            if chosen and weight > self.budget:
                break
            heapq.heappop(self._due)
            self._now = due
            chosen.append(rank)
        for rank in chosen:  # only now: none twice
            self._put(rank)
        return np.array(chosen, dtype=np.int64)

    def _put(self, rank: int) -> None:
        """Chooses when in its next unit of time a sample is due."""
        heapq.heappush(self._due, (self._units[rank] + self._random.random(), rank))
        self._units[rank] += 1.0
