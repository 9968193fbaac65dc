"""How long each step of a run will take: parts of it are done with the run's models, timed, and multiplied.

Everything is written in the folder of the context. Knows how much work each step has. Does not know sizes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import TrainerCallback

from pocl_fast.answers.decoding import answering_work
from pocl_fast.answers.likelihood import KEPT_BYTES, KeptStates, response_scores
from pocl_fast.curriculum.schedule import Schedule
from pocl_fast.curriculum.signals import teacher_columns
from pocl_fast.curriculum.stages import Curriculum, Stage, is_measured
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.models.precision import Precision
from pocl_fast.plan.context import PlanContext
from pocl_fast.plan.memory import states_bytes
from pocl_fast.plan.step_plan import Batches, StepPlan
from pocl_fast.plan.warmup import WarmupPlan
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.given_teacher import uses_of_teacher

WARM = 1  # steps before those that are timed: the first one makes the optimizer's state
TIMED = 2  # of each batch
SCORED = 64  # samples whose responses are scored


@dataclass(frozen=True)
class StepTime:
    """How long a step will take, and what was timed for it."""

    step: str
    seconds: float
    timed: str


@dataclass(frozen=True)
class Trial:
    """Seconds of the parts of a training."""

    loading: float
    typical: float  # an optimizer step of typical micro-batches
    largest: float
    cache: float | None  # of the teacher, a token; None where the training uses none


def time_plan(
    context: PlanContext,
    arguments: PoclConfig,
    schedule: Schedule,
    steps: StepPlan,
    batches: Batches,
    encoded: Sequence[EncodedSample],
    warmup: WarmupPlan | None = None,
) -> list[StepTime]:
    """The time of each step of `distill`, in their order. Loads both models, and prints what a training says of its
    steps. Raises `InputError` as the steps do."""
    start = time.perf_counter()
    student = context.student()
    loading = time.perf_counter() - start
    tokens, sets, both = sum(map(len, encoded)), _sets(context), 0.0
    measures = is_measured(context.config.schedule)
    of_teacher: list[_Answering] = []
    with context.precision.autocast(), context.engine(student.model) as engine:
        train = _Answering(context, engine, [one.prompt_ids for one in encoded]) if measures else None
        scored = again = _seconds_a_token(lambda some: response_scores(student, some), encoded)
        answering = [_Answering(context, engine, [one.prompt_ids for one in of_set]) for of_set in sets]
        reads_teacher = measures and bool(teacher_columns(context.config.difficulty.signals))
        if reads_teacher or (sets and context.scores_teacher):
            teacher = context.scoring_teacher()
            both = _seconds_a_token(lambda some: response_scores(student, some, teacher), encoded)
    if sets and context.scores_teacher:
        keeping = replace(teacher, kept=KeptStates())  # filled by the first scoring, read by the second, which is less
        with context.precision.autocast(), context.engine(teacher.model) as engine:
            kept = _seconds_a_token(lambda some: response_scores(student, some, keeping), encoded)
            again = seconds_again(both, kept, states_bytes(sets, teacher.model))
            of_teacher = [_Answering(context, engine, [one.prompt_ids for one in of_set]) for of_set in sets]
    trial = _trial(context, arguments, batches, schedule)
    found = [StepTime("load and check the models", loading + trial.loading, "once each")]
    if train is not None:
        found.append(StepTime("measure", train.seconds + scored * tokens, train.timed))
    if reads_teacher:
        found.append(StepTime("measure the teacher", both * tokens, f"{SCORED} samples"))
    training = _training(trial, batches, steps, tokens)
    warming = [] if warmup is None else [_warming(trial, batches, steps, warmup)]
    before: list[StepTime] = []
    after: list[StepTime] = []
    if answering:
        once = answering[0].seconds + scored * sum(map(len, sets[0]))
        count = steps.evaluations
        training += [StepTime("evaluate in training", count * once, f"{count} times {once:.1f} s")] if count else []
        seeds, first = len(context.config.evaluation.eval_seeds), both if context.scores_teacher else scored
        before, after = final_evaluations(sets, answering, of_teacher, scored, first=first, again=again, seeds=seeds)
    if warming and before:
        before.append(replace(after[0], step="evaluate warmed up"))
    return [found[0], *warming, *found[1:], *before, *training, *after]


def final_evaluations(
    sets: Sequence[Sequence[EncodedSample]],
    student: Sequence[_Answering],
    teacher: Sequence[_Answering],
    scored: float,
    *,
    first: float,
    again: float,
    seeds: int,
) -> tuple[list[StepTime], list[StepTime]]:
    """The final evaluations before training, the teacher's too where there are its answers, and that after training.
    Seconds a token: `scored` of the student alone, the `first` evaluation of a run, and `again` one of the others."""
    tokens = sum(len(one) for of_set in sets for one in of_set)
    answers, timed = seeds * sum(one.seconds for one in student), f"{seeds} seeds; {student[0].timed}"
    before = StepTime("evaluate before", answers + first * tokens, timed)
    after = StepTime("evaluate after", answers + again * tokens, timed)
    if not teacher:
        return [before], [after]
    of_teacher = seeds * sum(one.seconds for one in teacher) + max(0.0, again - scored) * tokens
    return [before, StepTime("evaluate the teacher", of_teacher, f"{seeds} seeds; {teacher[0].timed}")], [after]


def seconds_again(first: float, kept: float, needed: int) -> float:
    """Seconds a token of a later evaluation, of a `first` one and of one whose teacher's states are all `kept`; all of
    them are `needed` bytes, of which there is room for some."""
    share = min(1.0, KEPT_BYTES / needed) if needed else 1.0
    return share * kept + (1 - share) * first


def _sets(context: PlanContext) -> list[Sequence[EncodedSample]]:
    """The samples of each set that is evaluated, the one first that training is watched by."""
    return [one.data.encoded for one in context.evaluation_sets] if context.has_dev else []


class _Answering:
    """How long the answers to some prompts take, by those of one batch of middling length."""

    def __init__(self, context: PlanContext, engine: Any, prompts: Sequence[Sequence[int]]) -> None:
        most = context.config.generation.max_new_tokens
        batches = engine.batches(prompts, most)
        chosen = batches[len(batches) // 2]
        some = [prompts[i] for i in chosen]

        def answer() -> None:
            engine.generate(
                some,
                sample_ids=list(chosen),
                end_ids=context.encoder.end_ids,
                max_new_tokens=most,
                temperature=context.config.difficulty.measure_temperature,
                seed=0,
            )

        seconds = _least(answer, 2)
        works = [answering_work(prompts, batch, most) for batch in batches]
        self.seconds = seconds * sum(works) / works[len(batches) // 2]
        self.timed = f"a batch of {len(some)} answers in {seconds:.2f} s"


def _seconds_a_token(score: Callable[[list[EncodedSample]], object], encoded: Sequence[EncodedSample]) -> float:
    step = max(1, len(encoded) // SCORED)
    some = list(encoded[::step])[:SCORED]
    return _least(lambda: score(some), 2) / sum(map(len, some))


def _least(work: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _training(trial: Trial, batches: Batches, steps: StepPlan, tokens: int) -> list[StepTime]:
    """A step's time is taken to grow linearly with its tokens between the two that were timed, and in proportion to
    them beyond: the two may have nearly the same number of tokens, and a line through them then says nothing."""
    sizes = [steps.accumulation * sum(map(len, one)) for one in (batches.typical, batches.largest)]
    each = step_seconds(steps.tokens_a_step, sizes, (trial.typical, trial.largest))
    small, large = sizes
    timed = f"steps of {small:,} and {large:,} tokens in {trial.typical:.2f} and {trial.largest:.2f} s"
    train = StepTime("train", each * steps.steps, timed)
    if trial.cache is None:
        return [train]
    return [StepTime("the teacher's cache", trial.cache * tokens, f"{1 / trial.cache:,.0f} tokens/s"), train]


def _warming(trial: Trial, batches: Batches, steps: StepPlan, warmup: WarmupPlan) -> StepTime:
    """By the training's steps, which compare with a teacher too."""
    sizes = [steps.accumulation * sum(map(len, one)) for one in (batches.typical, batches.largest)]
    each = step_seconds(warmup.tokens / warmup.steps, sizes, (trial.typical, trial.largest))
    return StepTime("warm up", each * warmup.steps, f"at most: {warmup.steps:,} steps as the training's")


def step_seconds(tokens: float, sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """How long a step of so many tokens takes, by two others: their tokens, ascending, and seconds."""
    (small, large), (short, long) = sizes, seconds
    if tokens <= small or large == small:
        return short * tokens / small
    if tokens >= large:
        return long * tokens / large
    return short + (long - short) * (tokens - small) / (large - small)


# ---- a training of a few steps ----


class _TrialSchedule(Schedule):
    """Steps of given micro-batches, in one stage of `stage_steps`."""

    batches: list[list[int]]

    def batch(self, step: int, part: int, rank: int = 0) -> list[int]:
        return self.batches[step]


class _Clock(TrainerCallback):
    """Notes how long each step takes, with its loss, gradients and the optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)


def _trial(context: PlanContext, arguments: PoclConfig, batches: Batches, schedule: Schedule) -> Trial:
    """Trains a few steps, with the teacher's outputs of their samples in its cache, as from the second pass on."""
    from pocl_fast.training.trainer import PoclTrainer

    samples = list({one.index: one for one in (*batches.typical, *batches.largest)}.values())
    index = np.array([one.index for one in samples])
    stage = Stage(0, len(index), arguments.temperature[0], min(one.alpha for one in schedule.stages))
    trial = _TrialSchedule(
        Curriculum(index, np.zeros(len(index)), (stage,)), schedule.lengths, schedule.size, stage_steps=WARM + 2 * TIMED
    )
    typical, largest = ([one.index for one in part] for part in (batches.typical, batches.largest))
    trial.batches = [typical] * (WARM + TIMED) + [largest] * TIMED
    start = time.perf_counter()
    student, known, clock = context.take_student().model, SampleSet(context.train_file.samples, samples), _Clock()
    teacher = context.take_cached_teacher() if uses_of_teacher(arguments, schedule.curriculum) else None
    made = teacher, _quiet(arguments, context.precision), known, None, context.encoder
    trainer = PoclTrainer(student, *made, curriculum=trial.curriculum, callbacks=[clock])
    loading = time.perf_counter() - start
    context.precision.set_modes()
    with context.precision.autocast():
        cache = None if teacher is None else _seconds_of_cache(teacher, batches, samples)
    trainer.schedule = trial
    trainer.train()
    seconds = clock.seconds
    return Trial(loading, min(seconds[WARM : WARM + TIMED]), min(seconds[WARM + TIMED :]), cache)


def _seconds_of_cache(teacher: Any, batches: Batches, samples: Sequence[EncodedSample]) -> float:
    """Fills the cache with the samples; seconds a token, without those of the first sample."""
    first, *others = samples
    teacher.fill([first])
    start = time.perf_counter()
    teacher.fill(others or [first])
    return (time.perf_counter() - start) / sum(map(len, others or [first]))


def _quiet(arguments: PoclConfig, precision: Precision) -> PoclConfig:
    """The arguments of a training that saves, evaluates and reports nothing, and has no answers of its own."""
    made = copy.copy(arguments)
    changes: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "patience": None, "rollouts": "none"}
    changes |= {"precision": precision.name, "computed_in": precision, "max_steps": -1, "stage_weights": "last"}
    changes |= {"remeasure": False, "report_to": []}
    for name, value in changes.items():
        setattr(made, name, value)
    return made
