"""How many optimizer steps each stage has, so that a control trains for exactly as many as the curriculum it stands
beside.

Knows stages, lengths and schedules. Does not know models. Every `--curriculum` and every pacing has the steps of
`pocl`'s stages with the same other options. Where batches are cut by samples, these follow from the number of samples.
Where they are cut by tokens, they depend on the order too: on the measured one for "pocl" and "reverse", and else,
for nothing was measured, on that of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np

from pocl_fast.curriculum.competence import Competence
from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.curriculum.stages import Curriculum, StageSettings, is_measured, paces_by_competence, stage_sizes


class PaceSettings(StageSettings, Protocol):
    """What options say about stages and their lengths."""

    @property
    def within_stage(self) -> Literal["constant", "linear"]: ...
    @property
    def epochs_per_stage(self) -> int: ...
    @property
    def steps_per_stage(self) -> int | None: ...
    @property
    def stage_length(self) -> Literal["passes", "equal"]: ...


def paced(
    curriculum: Curriculum,
    lengths: Mapping[int, int],
    size: BatchSize,
    settings: PaceSettings,
    *,
    seed: int,
    reorders: bool = False,
) -> Schedule:
    """The schedule of a training along this curriculum, as the settings say; `lengths` are the samples' tokens."""
    made = Schedule(
        curriculum,
        dict(lengths),
        size,
        seed=seed,
        epochs=settings.epochs_per_stage,
        within_stage=settings.within_stage,
        reorders=reorders,
    )
    competence = Competence(settings.initial_competence, settings.full_competence)
    return replace(
        made, stage_steps=_steps(made, settings), competence=competence if paces_by_competence(settings) else None
    )


Pacing = Literal["auto", "baby-steps", "competence"]


def settled_pacing(pacing: Pacing, *, remeasure: bool, given: bool = False) -> Pacing:
    """The pacing, and what "auto" is: stages that are ranked anew, or a curriculum that is `given`, are baby steps."""
    if pacing != "auto":
        return pacing
    return "baby-steps" if remeasure or given else "competence"


def counts_are_the_files(size: BatchSize, settings: PaceSettings) -> bool:
    """Whether the number of steps is that of `pocl` over the file's order, and pocl's own, over the measured order, may
    be another."""
    return size.tokens is not None and settings.steps_per_stage is None and not is_measured(settings)


def _steps(made: Schedule, settings: PaceSettings) -> tuple[int, ...] | None:
    """Each stage's number of steps; None where it is that of `epochs_per_stage` passes over its own samples."""
    count = len(made.stages)
    if settings.curriculum == "none":
        return evenly(sum(_steps_of_pocl(made, settings)), count)
    if settings.steps_per_stage is not None:
        return (settings.steps_per_stage,) * count
    if settings.stage_length == "equal" or paces_by_competence(settings):
        return evenly(sum(_steps_of_pocl(made, settings)), count)
    if settings.curriculum != "pocl" and made.size.tokens is not None:
        return tuple(_steps_of_pocl(made, settings))
    return None


def _steps_of_pocl(made: Schedule, settings: PaceSettings) -> Sequence[int]:
    """The steps of the stages that "pocl" with baby steps has, with the same other options."""
    order = np.sort(made.curriculum.order)
    if is_measured(settings):
        order = made.curriculum.order[:: -1 if settings.curriculum == "reverse" else 1]
    stages = made.stages
    if settings.curriculum == "none" or paces_by_competence(settings):  # stages of another number or of other sizes
        count = settings.stages if settings.curriculum == "none" else len(stages)
        sizes = stage_sizes(len(order), min(count, len(order)))
        stages = tuple(replace(made.stages[-1], index=i, size=size) for i, size in enumerate(sizes))
    if settings.steps_per_stage is not None:
        return (settings.steps_per_stage,) * len(stages)
    pocl = replace(made, curriculum=replace(made.curriculum, order=order, stages=stages))
    return [pocl.planned_steps(stage.index) for stage in stages]


def evenly(total: int, parts: int) -> tuple[int, ...]:
    """`total` as a sum of `parts` numbers that differ by one at most."""
    bounds = [total * i // parts for i in range(parts + 1)]
    return tuple(after - before for before, after in itertools.pairwise(bounds))
