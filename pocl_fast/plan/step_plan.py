"""The steps of a training before its samples are ranked: stages, passes, optimizer steps and the tokens of a batch.

Knows the schedule. Does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocl_fast.curriculum.schedule import Schedule
from pocl_fast.curriculum.stages import Curriculum, Stage, is_measured, stages_over, unmeasured_curriculum
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.setup import schedule_of

LOOKED_AT = 4096  # steps, spread over the last stage, in which the largest batch is sought


@dataclass(frozen=True)
class StagePlan:
    """A stage, and what its settings are at its first step."""

    stage: int  # from 1
    samples: int
    passes: float
    steps: int
    temperature: float
    alpha: float


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a training."""

    stages: list[StagePlan]
    steps: int
    exact: bool  # whether there will be just so many; else about so many
    note: str  # what the number depends on
    evaluations: int  # of the dev set, in training
    tokens: int  # trained on in all, each pass counted; prompts included
    tokens_a_step: int  # mean
    batch_tokens: int  # of a typical micro-batch
    largest_batch_tokens: int
    accumulation: int


@dataclass(frozen=True)
class Batches:
    """Two micro-batches of a training, as samples."""

    typical: list[EncodedSample]
    largest: list[EncodedSample]


def planned_schedule(
    arguments: PoclConfig, encoded: Sequence[EncodedSample], output: Path | None
) -> tuple[Schedule, bool]:
    """The training's schedule, and whether the order of the samples is the one that it will have: one that is not
    measured, or that of a `curriculum.json` in `output`. Else it is the order of the file.

    Raises `InputError` for stages that do not fit the samples.
    """
    if not is_measured(arguments):
        return schedule_of(arguments, unmeasured_curriculum(encoded, arguments, seed=arguments.seed), encoded), True
    index, known = np.array([one.index for one in encoded]), False
    score = np.zeros(len(index))
    if output is not None and (path := output / "curriculum.json").is_file():
        ranked = Curriculum.load(path)
        if known := set(ranked.order.tolist()) == set(index.tolist()):
            index, score = ranked.order, ranked.score
    return schedule_of(arguments, stages_over(index, score, arguments), encoded), known


def step_plan(
    schedule: Schedule, arguments: PoclConfig, encoded: Sequence[EncodedSample], batches: Batches, *, ordered: bool
) -> StepPlan:
    """The numbers of a schedule with these trial batches; `ordered` says whether its order is known."""
    lengths = {one.index: len(one) for one in encoded}
    mean = sum(lengths.values()) / len(lengths)
    stages: list[StagePlan] = []
    tokens = 0.0
    for stage in schedule.stages:
        steps = schedule.planned_steps(stage.index)
        first = sum(one.steps for one in stages)
        passes = schedule.place(first + steps - 1).passes - (schedule.place(first - 1).passes if first else 0.0)
        tokens += passes * _pass_tokens(schedule, stage, mean, ordered=ordered)
        stages.append(StagePlan(stage.index + 1, stage.size, round(passes, 4), steps, stage.temperature, stage.alpha))
    total, planned = schedule.total_steps, schedule.total_steps
    if arguments.max_steps > 0:
        total = min(total, arguments.max_steps)
    exact, note = _certainty(schedule, arguments, ordered=ordered)
    evaluations = sum(-(-round(one.passes, 6) // 1) for one in stages)
    return StepPlan(
        stages=stages,
        steps=total,
        exact=exact,
        note=note,
        evaluations=_evaluations(arguments, total, round(evaluations * total / planned)),
        tokens=round(tokens * total / planned),
        tokens_a_step=round(tokens / planned),
        batch_tokens=sum(map(len, batches.typical)),
        largest_batch_tokens=sum(map(len, batches.largest)),
        accumulation=arguments.gradient_accumulation_steps,
    )


def _pass_tokens(schedule: Schedule, stage: Stage, mean: float, *, ordered: bool) -> float:
    """Tokens of a pass over a stage's samples; by competence as many samples as there are, of those it may draw."""
    subset, lengths = schedule.subset(stage.index), schedule.lengths
    each = sum(lengths[i] for i in subset.tolist()) / len(subset) if ordered else mean
    return each * (stage.size if schedule.competence is None else len(schedule.curriculum.order))


def _certainty(schedule: Schedule, arguments: PoclConfig, *, ordered: bool) -> tuple[bool, str]:
    if arguments.patience is not None:
        return False, f"at most so many: a stage ends when {arguments.patience} evaluations brought nothing better"
    by_tokens = schedule.size.tokens is not None and arguments.steps_per_stage is None
    if by_tokens and (arguments.remeasure or not ordered):
        return False, "about so many: batches are cut by tokens, and the order is known once difficulty is measured"
    return True, "exact"


def _evaluations(arguments: PoclConfig, steps: int, passes: int) -> int:
    """How often the dev set is evaluated in training."""
    strategy = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    if strategy == "steps":
        every = float(arguments.eval_steps or arguments.logging_steps)
        return int(steps // max(1.0, every if every >= 1 else every * steps))
    return passes if strategy == "epoch" else 0


def trial_batches(schedule: Schedule, encoded: Sequence[EncodedSample]) -> Batches:
    """A typical and the largest micro-batch, by their tokens, of those in the last stage, which has all samples; of
    very many steps `LOOKED_AT` are looked at."""
    by_index = {one.index: one for one in encoded}
    last = schedule.stages[-1].index
    first = sum(schedule.planned_steps(stage.index) for stage in schedule.stages[:-1])
    count = schedule.planned_steps(last)
    steps = np.unique(np.linspace(first, first + count - 1, min(count, LOOKED_AT)).astype(int)).tolist()
    found = []
    for step in steps:
        for part in range(schedule.size.accumulation):
            if chosen := schedule.batch(step, part):
                found.append((sum(schedule.lengths[i] for i in chosen), chosen))
    found.sort(key=lambda one: one[0])
    typical, largest = found[len(found) // 2][1], found[-1][1]
    return Batches([by_index[i] for i in typical], [by_index[i] for i in largest])
