"""`pocl-fast plan`: all parts of a plan, in the order in which they are found out.

Knows which part needs which model. Does not know how a part is computed, nor how it is shown.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from pocl_fast.answers.likelihood import KEPT_BYTES
from pocl_fast.curriculum.signals import teacher_columns
from pocl_fast.curriculum.stages import is_measured
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.inputs.positions import check_positions
from pocl_fast.options.run import RunConfig
from pocl_fast.plan.context import PlanContext
from pocl_fast.plan.data_plan import DataPlan, data_plan
from pocl_fast.plan.disk import DiskPlan, disk_plan
from pocl_fast.plan.memory import Sizes, StepMemory, answered_prompts, memory_plan, room, states_bytes
from pocl_fast.plan.optimizer import ADAM, state_bytes_a_weight
from pocl_fast.plan.shapes import ModelPlan, empty_model, empty_student, model_plan
from pocl_fast.plan.step_plan import StepPlan, planned_schedule, step_plan, trial_batches
from pocl_fast.plan.timing import StepTime, time_plan
from pocl_fast.plan.warmup import WarmupPlan, warmup_plan
from pocl_fast.system.errors import InputError, first_line
from pocl_fast.teacher.loading import WITH_STUDENT
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.given_teacher import uses_of_teacher


@dataclass(frozen=True)
class MemoryPlan:
    """What each step takes at its peak, in bytes, and what there is."""

    steps: list[StepMemory]
    of: str  # which memory
    free: int

    @property
    def fits(self) -> bool:
        return max(step.total for step in self.steps) <= self.free


@dataclass
class Plan:
    """What a run would take; None for parts that a model or an option is missing for, which `notes` say."""

    data: dict[str, DataPlan] = field(default_factory=dict)  # train, dev
    warmup: WarmupPlan | None = None  # None without one, too
    steps: StepPlan | None = None
    models: dict[str, ModelPlan] = field(default_factory=dict)  # teacher, student
    disk: DiskPlan | None = None
    memory: MemoryPlan | None = None
    times: list[StepTime] | None = None
    notes: list[str] = field(default_factory=list)  # what a run would say of its data and models, and what is missing

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes, tokens and seconds as numbers; each step's memory and the sums with it."""
        made = asdict(self)
        if self.disk is not None:
            made["disk"]["fits"] = self.disk.fits
        if self.memory is not None:
            made["memory"]["fits"] = self.memory.fits
            for step, known in zip(made["memory"]["steps"], self.memory.steps, strict=True):
                step["total"] = known.total
        return made


def make_plan(config: RunConfig, output: Path | None = None, *, times: bool = False) -> Plan:
    """The plan of a run with these options. `output` is read where it holds a run, and never written to.

    Raises `InputError` for what the run would refuse. With `times` models are loaded, and steps timed in a temporary
    folder.
    """
    plan = Plan()
    with tempfile.TemporaryDirectory(prefix="pocl-fast-plan-") as name:
        context = PlanContext(output, Path(name), config, _notes(plan, Path(name)))
        arguments = context.check()
        _Maker(plan, context, arguments).make(times=times)
    return plan


def _notes(plan: Plan, folder: Path) -> Callable[[str], None]:
    """Keeps what a run says, but for lines about the folder that stands for its own."""

    def say(text: str) -> None:
        if str(folder) not in text:
            plan.notes.append(text)

    return say


class _Maker:
    """Fills a plan, part by part."""

    def __init__(self, plan: Plan, context: PlanContext, arguments: PoclConfig) -> None:
        self.plan, self.context, self.arguments = plan, context, arguments
        self.config = context.config
        self.teacher: Any = None
        self.student: Any = None
        self.encoded: Sequence[EncodedSample] = context.train_file.encoded

    def make(self, *, times: bool) -> None:
        self._data()
        self._answers()
        self._models()
        self.plan.warmup = warmup_plan(self.context, self.encoded)
        schedule, ordered = planned_schedule(self.arguments, self.encoded, self.context.output)
        batches = trial_batches(schedule, self.encoded)
        distils = bool(uses_of_teacher(self.arguments, schedule.curriculum))
        steps = step_plan(schedule, self.arguments, self.encoded, batches, ordered=ordered)
        self.plan.steps = steps
        state = self._optimizer_state()
        passes = steps.evaluations if self.context.has_dev else int(sum(one.passes for one in steps.stages))
        self.plan.disk = disk_plan(
            self.student,
            self.teacher if distils else None,
            self.encoded,
            self.arguments,
            tokenizer=self.context.tokenizer,
            state=state,
            saves=max(1, passes),
            evaluations=steps.evaluations if self.context.has_dev else 0,
            warmup=self.plan.warmup,
            output=self.context.output,
        )
        if self.student is not None:
            self._memory(self._sizes(batches, state, distils=distils))
        self._not_counted(times=times)
        if times and self._can_be_timed(distils=distils):
            with contextlib.redirect_stdout(io.StringIO()):  # what a training says of its steps
                self.plan.times = time_plan(
                    self.context, self.arguments, schedule, steps, batches, self.encoded, self.plan.warmup
                )

    def _data(self) -> None:
        context, data = self.context, self.config.data
        sets = [("train", str(data.train), context.train_file, context.reports.get("--train"))]
        for one in context.evaluation_sets if context.has_dev else ():
            name = "dev" if one.data is context.dev_set else one.title
            sets.append((name, one.source, one.data, context.reports.get(one.named.name)))
        for name, given, known, report in sets:  # no report of samples that are held out of others
            self.plan.data[name] = made = data_plan(given, known, report, data)
            if report is not None and not made.report:  # its line says no more than the table
                self.plan.notes.remove(report.describe(given))
        if not context.has_dev:
            self._note("--dev is missing: `distill` needs held-out samples, here nothing is counted of them")

    def _answers(self) -> None:
        """The teacher's answers are not known yet: each is taken to be as long as it may be."""
        if self.config.data.data_source == "data":
            return
        most, room_ = self.config.generation.max_new_tokens, self.config.data.max_length
        self.encoded = [
            replace(one, response_ids=(0,) * max(1, min(most, room_ - len(one.prompt_ids))), supervised=())
            for one in self.encoded
        ]
        self._note("--data-source teacher: its answers are not known yet, and counted as the longest that they may be")

    def _models(self) -> None:
        chosen, context = self.config.models, self.context
        if context.has_teacher:
            self.teacher = self._made(
                lambda: empty_model(str(chosen.teacher), trust_remote_code=chosen.trust_remote_code)
            )
        else:
            self._note("--teacher is missing: its cache, memory and time are left out")
        if not context.has_student:
            self._note("--student or --student-layers is missing: the student's part is left out")
        elif chosen.student is not None or self.teacher is not None:
            made = self._made(lambda: empty_student(self.config, self.teacher))
            if made is not None:
                self.student, whole = made
                self.plan.models["student"] = model_plan(context.student_source, self.student, whole=whole)
        if self.teacher is not None:
            self.plan.models = {"teacher": model_plan(str(chosen.teacher), self.teacher), **self.plan.models}
        self._positions()

    def _made(self, make: Callable[[], Any]) -> Any:
        """A model on the meta device; None, with a note, where its code needs its weights for it."""
        try:
            return make()
        except InputError:
            raise
        except Exception as error:  # whatever a family's own code raises on the meta device
            self._note(f"a model's configuration alone does not tell its sizes ({first_line(error, named=True)})")
            return None

    def _optimizer_state(self) -> float:
        """Bytes a trained weight; AdamW's, with a note, where one step does not tell."""
        if (found := state_bytes_a_weight(self.arguments)) is not None:
            return found
        name = str(getattr(self.arguments.optim, "value", self.arguments.optim))
        self._note(f"what the optimizer {name} keeps is not known before it runs, and counted as AdamW's")
        return ADAM

    def _positions(self) -> None:
        context, answer = self.context, self.config.generation.max_new_tokens
        most = max(self.config.data.max_length, context.longest_prompt + answer)
        for whose, model in (("student", self.student), ("teacher", self.teacher)):
            if model is not None:
                check_positions(model, most, whose)

    def _sizes(self, batches: Any, state: float, *, distils: bool) -> Sizes:
        config, context = self.config, self.context
        chosen, generation = config.models, config.generation
        here = chosen.teacher_device == WITH_STUDENT and self.teacher is not None
        sets = [one.data.encoded for one in context.evaluation_sets] if context.has_dev else []
        measures = is_measured(config.schedule)
        return Sizes(
            student=self.student,
            teacher=self.teacher if here else None,
            cut=chosen.student is None and chosen.teacher_quantization == "none",
            quantization=chosen.teacher_quantization,
            precision=context.precision,
            batches=batches,
            tokens=sum(map(len, self.encoded)),
            prompts=answered_prompts(context.train_file.encoded if measures else (), *sets),
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.generation_batch_size,
            batch_tokens=generation.generation_batch_tokens,
            top_k=config.cache.cache_mode == "topk",
            checkpointing=bool(self.arguments.activation_checkpointing),
            accumulates=self.arguments.gradient_accumulation_steps > 1,
            state=state,
            evaluates=bool(self.plan.steps and self.plan.steps.evaluations) and context.has_dev,
            measures=measures,
            scores_teacher=measures and bool(teacher_columns(config.difficulty.signals)),
            evaluates_teacher=bool(sets) and context.scores_teacher,
            kept_states=min(KEPT_BYTES, states_bytes(sets, self.teacher))
            if context.scores_teacher and self.teacher is not None
            else 0,
            warms_up=self.plan.warmup is not None,
            distils=distils,
            base=psutil.Process().memory_info().rss if context.device.type == "cpu" else 0,
        )

    def _memory(self, sizes: Sizes) -> None:
        try:
            steps = memory_plan(sizes)
        except Exception as error:  # a family may look at values, which nothing on the meta device has
            family = type(self.student).__name__
            self._note(f"the memory of {family} is not told by its sizes alone ({first_line(error, named=True)})")
            return
        of, free = room(self.context.device)
        self.plan.memory = MemoryPlan(steps, of, free + sizes.base)

    def _not_counted(self, *, times: bool) -> None:
        place, rollouts = self.config.models.teacher_device, self.config.rollouts.rollouts
        if place != WITH_STUDENT and self.context.has_teacher:
            self._note(f"--teacher-device {place}: the teacher's memory, which is not the student's, is not counted")
        if (choice := self.context.layer_choice) != "even":
            self._note(f"--layer-choice {choice}: planned with the even layers, without the time of measuring others")
        if times and rollouts != "none":
            self._note(f"--rollouts {rollouts}: the time of the student's own answers in training is not counted")

    def _can_be_timed(self, *, distils: bool) -> bool:
        if self.context.has_student and (self.context.has_teacher or not distils):
            return True
        self._note("--time needs --teacher, and --student or --student-layers")
        return False

    def _note(self, text: str) -> None:
        self.plan.notes.append(text)
