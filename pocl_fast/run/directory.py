"""The run directory: its configuration, its lock, and the stamps that say what each step was made from.

Knows files and options. Does not know what the steps do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pocl_fast.curriculum.signals import TEACHER_SCORES, may_read_teacher, teacher_columns
from pocl_fast.curriculum.stages import is_measured
from pocl_fast.inputs.adapters import configuration_file
from pocl_fast.models.fingerprints import source_fingerprint
from pocl_fast.models.precision import PRECISION_FILE
from pocl_fast.options.declaring import option_name
from pocl_fast.options.run import RunConfig
from pocl_fast.options.training import OptimisationOptions
from pocl_fast.records.sources import source_of
from pocl_fast.run.evaluation_file import EVALUATION, without
from pocl_fast.settings.configuration import to_yaml
from pocl_fast.settings.evaluation_sets import SETS, NamedSet, evaluations_choose, sets_of
from pocl_fast.system import ranks
from pocl_fast.system.console import measured
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json, write_text
from pocl_fast.system.fingerprint import file_fingerprint
from pocl_fast.templates.template_date import DATE_FILE


@dataclass(frozen=True)
class Reads:
    """What a step is made from: every option of these groups but those named, and files by their content."""

    groups: tuple[str, ...]
    but: tuple[str, ...]  # options that do not change the step's result
    files: tuple[str, ...] = ()
    to_remeasure: tuple[str, ...] = ()  # options that only --remeasure reads here
    set_aside: tuple[str, ...] = ()  # beginnings of the names of --set arguments that it does not read
    student: bool = False  # whether it is made from the student that is measured, which a warm-up has made

    def options(self, config: RunConfig) -> dict[str, Any]:
        """The values of these options, by name; an argument of --set under its own."""
        values: dict[str, Any] = {}
        for group in (getattr(config, name) for name in self.groups):
            values |= {option_name(f): getattr(group, f.name) for f in fields(group)}
        others = values.pop("set", {})
        if not config.stages.remeasure:
            values = {name: value for name, value in values.items() if name not in self.to_remeasure}
        if others.get("eval_strategy") == "steps" and "eval_steps" not in others and "logging" in self.groups:
            others = others | {"eval_steps": config.logging.logging_steps}  # what transformers takes then
        if config.adapters.lora_rank is None and config.adapters.peft_config is None:
            values = {name: value for name, value in values.items() if name not in _OF_ADAPTERS}
        if config.schedule.pacing != "competence":
            values = {name: value for name, value in values.items() if name not in _OF_COMPETENCE}
        if config.data.dev:
            values.pop("held_out", None)
        if "warmup" in self.groups and config.warmup.warmup_learning_rate is not None:
            values.pop("learning_rate")
        unread = (*_AROUND, *self.set_aside)
        values |= {f"--set {name}": value for name, value in others.items() if not name.startswith(unread)}
        return {name: value for name, value in values.items() if name not in self.but}


LAYERS = "layers"  # no step of its own: the choice of layers that measuring makes for a student, for all steps
WARMED = "warmup/student"  # the warmed-up student
STUDENT, STUDENT_ADAPTERS = "student/model.safetensors", "student/adapter_model.safetensors"
_WARM = "warmed-up student"
_OF_ADAPTERS = ("lora_alpha", "lora_targets", "merge_adapters")  # which mean nothing without adapters
_OF_COMPETENCE = ("initial_competence", "full_competence")
_DEVICES = ("device", "teacher_device")
_BEFORE_STEPS = (".lock", DATE_FILE, PRECISION_FILE)  # what may be there before the first step
_TEACHER = ("teacher", "teacher_quantization")
# beginnings of the names of transformers' arguments that do not change what is learnt
_AROUND = (
    "log", "save_", "run_name", "project", "trackio_", "hub_", "push_to_hub", "dataloader_", "disable_tqdm", "ddp_",
    "torch_empty_cache_steps", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
    "skip_memory_metrics", "debug",
)  # fmt: skip
# and those that a warm-up does without: its learning rate is one cosine, nothing is evaluated or uploaded
NOT_IN_WARMUP = (
    "lr_scheduler", "warmup_", "max_steps", "eval_", "metric_for_best_model", "greater_is_better", "hub_",
    "push_to_hub", "run_name",
)  # fmt: skip
_TRAINING = ("loss", "stages", "optimisation", "logging", "trainer", "rollouts", "cache")
_SPEED = ("generation_batch_size", "generation_batch_tokens", "activation_checkpointing")
_LOGS = ("logging_steps", "report_to", "save_minutes")
READS = {
    "warmup": Reads(
        ("models", "data", "adapters", "warmup", "optimisation", "trainer"),
        (*_DEVICES, *_TEACHER, *SETS, "merge_adapters", "activation_checkpointing"),
        set_aside=NOT_IN_WARMUP,
    ),
    "measure": Reads(
        ("models", "data", "generation", "difficulty"), (*_DEVICES, *_TEACHER, *SETS, "signals"), student=True
    ),
    "measure-teacher": Reads(("models", "data"), (*_DEVICES, *SETS), student=True),
    "rank": Reads(
        ("difficulty", "schedule"), ("measure_temperature", "measure_seed"), ("difficulty.parquet", TEACHER_SCORES)
    ),
    "rank-unmeasured": Reads(  # rank, where the order is that of the samples themselves
        ("models", "data", "generation", "schedule", "optimisation"),
        (
            *_DEVICES, *_TEACHER, "precision", "student_layers", "dev", "test", "generation_batch_size",
            "generation_batch_tokens", "generation_engine", "rouge_tokenizer", "rrf_k", "ties",
            *(option_name(f) for f in fields(OptimisationOptions) if f.name != "seed"),
        ),
    ),
    "train": Reads(
        ("models", "data", "adapters", "generation", "difficulty", "schedule", *_TRAINING),
        (*_DEVICES, "test", *_SPEED, *_LOGS),
        ("curriculum.json",),
        (
            "generation_engine", "signals", "measure_temperature", "measure_seed", "rrf_k", "ties", "temperature",
            "alpha",
        ),
        student=True,
    ),
    "sft": Reads(
        ("models", "data", "adapters", "generation", "stages", "optimisation", "logging", "trainer"),
        (*_DEVICES, *_TEACHER, *_SPEED, *_LOGS, "test", "data_source", "generation_engine"),
    ),
    "evaluate-before": Reads(
        ("models", "data", "generation", "evaluation"), (*_DEVICES, *_TEACHER, "train", "data_source")
    ),
    "evaluate-warmed": Reads(
        ("models", "data", "generation", "evaluation"),
        (*_DEVICES, *_TEACHER, "train", "data_source"),
        student=True,
    ),
    "evaluate-after": Reads(
        ("models", "data", "generation", "evaluation"),
        (
            *_DEVICES, *_TEACHER, "train", "data_source", "student", "student_layers", "layer_choice",
            "trust_remote_code",
        ),
        (STUDENT,),
    ),
    LAYERS: Reads(("models", "data"), (*_DEVICES, *_TEACHER, "dev", "test")),
    "evaluate-teacher": Reads(
        ("models", "data", "generation", "evaluation"),
        (*_DEVICES, *_TEACHER, "train", "data_source", "student_layers", "layer_choice", "trust_remote_code"),
    ),
}  # fmt: skip
# Whose results a step builds on without reading the data behind them: what both are made from must agree.
BUILDS_ON = {"train": ("measure", "rank")}
# What each step leaves: its result, then what an interrupted one may have begun; "*" stands for each set.
WRITES = {
    "warmup": (WARMED, "warmup"),
    "measure": ("difficulty.parquet", "difficulty.parts"),
    "measure-teacher": (TEACHER_SCORES, "teacher_scores.parts"),
    "rank": ("curriculum.json", "difficulty.png"),
    "train": ("student", "checkpoints", "metrics.jsonl"),
    "sft": ("student", "checkpoints", "metrics.jsonl"),
    "evaluate-before": ("scores/*-before.parquet",),
    "evaluate-warmed": ("scores/*-warmed.parquet",),
    "evaluate-after": ("scores/*-after.parquet",),
    "evaluate-teacher": ("scores/*-teacher.parquet",),
}
# What means nothing once a step is done anew.
SPOILS = {
    "warmup": ("measure", "evaluate-warmed"),
    "measure": ("measure-teacher", "rank"),
    "train": ("evaluate-after",),
    "sft": ("evaluate-after",),
}
_OF_DISTILLING = ("warmup", "measure", "measure-teacher", "rank", "train")


def reads_of(step: str, config: RunConfig) -> Reads:
    """What a step is made from under these options."""
    if step != "rank" or is_measured(config.schedule):
        return READS[step]
    reads = READS["rank-unmeasured"]
    return reads if config.schedule.curriculum == "random" else replace(reads, but=(*reads.but, "seed"))


def results_of(step: str, config: RunConfig) -> list[str]:
    """The files and folders without which a step is not done."""
    result = WRITES[step][0]
    return [result.replace("*", one.name) for one in sets_of(config)] if "*" in result else [result]


class RunDirectory:
    """A folder that holds one run: its configuration, the stamps of its steps, and their files."""

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        """Opens or creates the folder and locks it; `restart` lets steps made from other input be done again.

        Raises `InputError` where it holds something else, or is in use.
        """
        self.path, self.restart = path, restart
        self._stamps_path = path / "steps.json"
        self.stamps: dict[str, Any] = {}  # of the first rank, which alone reads and writes here
        ranks.from_first(self._open)

    def _open(self) -> None:
        path = self.path
        if path.is_file():
            raise InputError(f"--output {path} is a file; give a folder")
        known = path / "config.yaml"
        if path.is_dir() and not known.exists() and any(p.name not in _BEFORE_STEPS for p in path.iterdir()):
            raise InputError(f"--output {path} holds other files and is not a run; give a new or an empty folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115 (held until the process ends)
        except OSError as error:
            raise InputError(f"cannot write to --output {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another pocl-fast is working in {path}; wait for it, or give another --output"
            ) from error
        self.stamps = json.loads(self._stamps_path.read_text()) if self._stamps_path.exists() else {}

    def begin(self, step: str, config: RunConfig) -> bool:
        """Whether the step is still to be done, on every rank. Raises `InputError` where it was begun with other
        options or files."""
        return ranks.from_first(lambda: self._begin(step, config))

    def check_kind(self, step: str) -> None:
        """Raises `InputError` where the folder holds a fine-tuning and the step is of distilling, or the reverse: both
        leave a student."""
        rivals = _OF_DISTILLING if step == "sft" else ("sft",) if step in _OF_DISTILLING else ()
        if any(rival in self.stamps for rival in rivals):
            kinds = ("distill", "sft") if step == "sft" else ("sft", "distill")
            raise InputError(
                f"{self.path} holds a run of `pocl-fast {kinds[0]}`, whose student this one would replace: give another"
                f" --output to `pocl-fast {kinds[1]}`"
            )

    def _begin(self, step: str, config: RunConfig) -> bool:
        self.check_kind(step)
        made_from = self.made_from(step, config)
        stamp = self.stamps.get(step)
        lost = stamp and [name for name in stamp["results"] if not (self.path / name).exists()]
        left = [path for name in WRITES[step] for path in self.path.glob(name)]
        if stamp and (lost if stamp["done"] else not left):
            stamp = None  # somebody deleted the result to have it made again, or the step failed before it began
        if stamp:
            changed = _changes(stamp["made_from"], made_from)
            if changed and not self.restart:
                state = "was made" if stamp["done"] else "was begun"
                raise InputError(
                    f"{self.path} holds another run: its step {step!r} {state} with other input ({changed})."
                    " Give the same options to go on, another --output for a new run,"
                    " or --restart to do this step again in this one"
                )
            if changed:
                stamp = None
            elif stamp["done"]:
                return False
        self._check_earlier(step, made_from, config)
        if stamp is None:
            self._clear(step)
        self.record(config)
        seconds, peak = (stamp["seconds"], stamp["peak_bytes"]) if stamp else (0.0, 0)
        stamp = {"done": False, "made_from": made_from, "seconds": seconds, "peak_bytes": peak}
        self.stamps[step] = stamp | {"results": results_of(step, config)}
        self._save_stamps()
        return True

    def record(self, config: RunConfig) -> None:
        """Writes the options of the run, for work that is no step."""
        if ranks.is_first():
            write_text(self.path / "config.yaml", to_yaml(config))

    def chooses_weights(self, step: str, one: NamedSet, config: RunConfig) -> bool:
        """Whether a set that a step evaluates has the samples whose scores choose weights in training, or chose them;
        on the first rank alone."""
        evaluated, first = self.stamps[step]["made_from"], sets_of(config)[0]
        read = evaluated[f"{first.name} data"] if first.role == "dev" else None
        if "train" in self.stamps:
            read = self.stamps["train"]["made_from"].get("dev data")
        return evaluations_choose(config) and evaluated[f"{one.name} data"] == read

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[dict[str, Any]]:
        """Stamps a step as done when the block ends, and with its time and memory however it ends.

        Gives a dict for facts that the stamp is to hold besides.
        """
        facts: dict[str, Any] = {}
        done = False
        try:
            with measured() as usage:
                yield facts
            done = True
        finally:
            if ranks.is_first():
                stamp = self.stamps[step]
                stamp["seconds"] += usage.seconds
                stamp["peak_bytes"] = max(stamp["peak_bytes"], usage.peak_bytes)
                stamp |= {"done": done, **facts}
                self._save_stamps()

    def made_from(self, step: str, config: RunConfig) -> dict[str, Any]:
        """What a step is made from with these options: their values, and files by their content. Raises `InputError`
        for files that are not there."""
        reads, every = reads_of(step, config), config.flat()
        made_from: dict[str, Any] = {}
        for name, value in reads.options(config).items():
            if name in SETS:
                made_from |= _of_sets(step, config)
            elif name == "train":
                made_from["train data"] = source_of(required(value, "--train")).fingerprint()
            elif name == "teacher":
                made_from[name] = source_fingerprint(required(value, _teacher_flag(step, every)))
            elif name == "student":
                source = source_fingerprint(required(value or every["teacher"], "--teacher"))
                made_from[name] = source if value else f"cut from {source}"
            elif name == "peft_config" and value is not None:
                made_from[name] = file_fingerprint(configuration_file(value))
            elif name == "chat_template" and value is not None and Path(value).expanduser().is_file():
                made_from[name] = f"{value} ({file_fingerprint(Path(value).expanduser())[:16]})"
            else:
                made_from[name] = value
            if name == "data_source" and value == "teacher":
                made_from["teacher answers"] = _answers_of(every)
        if step == "evaluate-before" and config.models.layer_choice != "even":  # its student is chosen by samples
            made_from["train data"] = source_of(required(every["train"], "--train")).fingerprint()
        if reads.student:
            made_from[_WARM] = self._warmed_student() if warms_up(config) else None
        return made_from | _of_scored_teacher(step, config) | self._files(reads.files, every)

    def _warmed_student(self) -> str:
        """Identifies the warmed-up student. Raises `InputError` where it is not there yet."""
        if not (self.path / WARMED).is_dir():
            raise InputError(f"{self.path / WARMED} is not there: run `pocl-fast measure` first, which warms up")
        return source_fingerprint(str(self.path / WARMED)).removeprefix(f"{self.path / WARMED} ").strip("()")

    def _files(self, names: Sequence[str], options: dict[str, Any]) -> dict[str, str]:
        """The fingerprints of files of this folder. Raises `InputError` for one that is not there yet."""
        fingerprints = {}
        for name in names:
            if name == STUDENT and (self.path / STUDENT_ADAPTERS).is_file():
                name = STUDENT_ADAPTERS
            there = (self.path / name).exists()
            if name == TEACHER_SCORES and not (there and may_read_teacher(options["signals"])):
                continue
            if not there:
                maker = next(s for s, outputs in WRITES.items() if name.split("/")[0] == outputs[0])
                raise InputError(f"{self.path / name} is not there: run `pocl-fast {maker} --output {self.path}` first")
            fingerprints[name] = file_fingerprint(self.path / name)
        return fingerprints

    def _check_earlier(self, step: str, made_from: dict[str, Any], config: RunConfig) -> None:
        """Raises `InputError` where a step that this one builds on was made from other options or data."""
        unwarmed = [s for s in ("measure", "train") if s in self.stamps and not self.stamps[s]["made_from"].get(_WARM)]
        if step == "warmup" and step not in self.stamps and unwarmed and not self.restart:
            raise InputError(
                f"{self.path} holds a run without a warm-up: its step {unwarmed[0]!r} was made from the student as it"
                " was given. Give the same options to go on, another --output for a new run, or --restart to do all"
                " again from a warmed-up student"
            )
        for earlier in BUILDS_ON.get(step, ()):
            if earlier not in self.stamps or (earlier == "measure" and not is_measured(config.schedule)):
                continue
            before = self.stamps[earlier]["made_from"]
            if changed := _changes(before, {name: value for name, value in made_from.items() if name in before}):
                raise InputError(
                    f"{self.path} holds another run: its step {earlier!r}, which {step!r} builds on, was made with"
                    f" other input ({changed}). Give the same options to go on, another --output for a new run,"
                    f" or do that step again first: `pocl-fast {earlier} --restart` with the new options"
                )

    def _clear(self, step: str) -> None:
        """Removes what an earlier try at the step left, and what was made of it."""
        for spoiled in SPOILS.get(step, ()):
            self._clear(spoiled)
        self.stamps.pop(step, None)
        if (results := self.path / EVALUATION).exists() and step.startswith("evaluate-"):
            write_json(
                results, without(json.loads(results.read_text(encoding="utf-8")), step.removeprefix("evaluate-"))
            )
        for path in [path for name in WRITES[step] for path in self.path.glob(name)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _save_stamps(self) -> None:
        write_json(self._stamps_path, self.stamps)


def warms_up(config: RunConfig) -> bool:
    """Whether the student is warmed up before it is measured."""
    return config.warmup.warmup_epochs is not None or config.warmup.warmup_steps is not None


def required(value: Any, option: str) -> Any:
    """The value of an option that must be there. Raises `InputError` where it is None."""
    if value is None:
        raise InputError(f"{option} is missing")
    return value


def _of_sets(step: str, config: RunConfig) -> dict[str, Any]:
    """The content of the sets that a step reads: the training reads the one alone that chooses weights."""
    known = sets_of(config)
    if not known or (step == "train" and known[0].role != "dev"):
        required(None, "--dev (or --held-out)")
    if step == "train":
        return {"dev data": _content(known[0], config)}
    contents = {f"{one.name} data": _content(one, config) for one in known}
    return {"sets": [f"--{one.role} {one.name}" for one in known], **contents}


def _content(one: NamedSet, config: RunConfig) -> str:
    """The fingerprint of a set's samples."""
    if one.source is None:
        return f"held out of {source_of(required(config.data.train, '--train')).fingerprint()}"
    return source_of(one.source).fingerprint()


def _of_scored_teacher(step: str, config: RunConfig) -> dict[str, Any]:
    """The teacher that an evaluation compares with, where it compares with one."""
    chosen = config.models
    if chosen.teacher is None or not config.evaluation.score_teacher or not step.startswith("evaluate-"):
        return {}
    content = source_fingerprint(chosen.teacher)
    return {"teacher": content, "teacher_quantization": chosen.teacher_quantization}


def _teacher_flag(step: str, options: dict[str, Any]) -> str:
    """The option that names the teacher, and for a step that measures, what asks for a teacher."""
    asked = next(iter(teacher_columns(options["signals"])), "") if step == "measure-teacher" else ""
    return f"--teacher (for --signals {asked})" if asked else "--teacher"


def _answers_of(options: dict[str, Any]) -> str:
    """Identifies the teacher whose answers are trained on."""
    source = source_fingerprint(required(options["teacher"], "--teacher (for --data-source teacher)"))
    return f"of {source} in {options['teacher_quantization']}"


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which values differ, old and new, for a message."""
    changed = [name for name in now if before.get(name) != now[name]]
    changed += [name for name in before if name.startswith("--set ") and name not in now]
    return "; ".join(f"{name}: was {_short(before.get(name))}, now {_short(now.get(name))}" for name in changed)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 and " " not in text else text
