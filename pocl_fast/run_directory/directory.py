"""The run directory: its configuration, its lock, and the stamps that say what each step was made from.

Knows files and options. Does not know what the steps do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pocl_fast.curriculum.signals import TEACHER_SCORES, may_read_teacher, teacher_columns
from pocl_fast.curriculum.stages import is_measured
from pocl_fast.inputs.adapters import configuration_file
from pocl_fast.models.fingerprints import source_fingerprint
from pocl_fast.models.precision import PRECISION_FILE
from pocl_fast.options.run import RunConfig
from pocl_fast.records.sources import source_of
from pocl_fast.run_directory.evaluation_file import EVALUATION, without
from pocl_fast.run_directory.step_inputs import (
    BUILDS_ON,
    OF_DISTILLING,
    STUDENT,
    STUDENT_ADAPTERS,
    WARM,
    WARMED,
    WRITES,
    reads_of,
    results_of,
    spoiled_by,
    warms_up,
)
from pocl_fast.settings.configuration import to_yaml
from pocl_fast.settings.evaluation_sets import SETS, NamedSet, evaluations_choose, sets_of
from pocl_fast.system import ranks
from pocl_fast.system.console import measured
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json, write_text
from pocl_fast.system.fingerprint import file_fingerprint
from pocl_fast.templates.template_date import DATE_FILE

_BEFORE_STEPS = (".lock", DATE_FILE, PRECISION_FILE)  # what may be there before the first step


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
        rivals = OF_DISTILLING if step == "sft" else ("sft",) if step in OF_DISTILLING else ()
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
            self._clear(step, config)
        if made_from.get(WARM, "") is None:  # a warm-up that the options no longer ask for
            self._remove("evaluate-warmed")
            self._remove("warmup")
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
        for trained in (known for name, known in self.stamps.items() if name in ("train", "sft")):
            read = trained["made_from"].get("dev data")
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
            option = f"--train (for --layer-choice {config.models.layer_choice})"
            made_from["train data"] = source_of(required(every["train"], option)).fingerprint()
        if step == "warmup" and config.data.data_source == "teacher":  # which its answers are as long as
            made_from["max_new_tokens"] = config.generation.max_new_tokens
        if reads.student:
            made_from[WARM] = self._warmed_student() if warms_up(config) else None
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
        unwarmed = [s for s in ("measure", "train") if s in self.stamps and not self.stamps[s]["made_from"].get(WARM)]
        if step == "warmup" and step not in self.stamps and unwarmed and not self.restart:
            raise InputError(
                f"{self.path} holds a run without a warm-up: its step {unwarmed[0]!r} was made from the student as it"
                " was given. Give the same options to go on, another --output for a new run, or --restart to do all"
                " again from a warmed-up student"
            )
        if made_from.get(WARM, "") is None and "warmup" in self.stamps and not self.restart:
            raise InputError(
                f"{self.path} holds a run with a warm-up, and these options have none. Give the same options to go on,"
                " another --output for a new run, or --restart to go on from the student as it was given"
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

    def _clear(self, step: str, config: RunConfig) -> None:
        """Removes what an earlier try at the step left, and what was made of it."""
        for spoiled in spoiled_by(step, config):
            self._clear(spoiled, config)
        self._remove(step)

    def _remove(self, step: str) -> None:
        """Removes a step's stamp and what it left."""
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


def required(value: Any, option: str) -> Any:
    """The value of an option that must be there. Raises `InputError` where it is None."""
    if value is None:
        raise InputError(f"{option} is missing")
    return value


def _of_sets(step: str, config: RunConfig) -> dict[str, Any]:
    """The content of the sets that a step reads: the training reads the one alone that chooses weights."""
    known = sets_of(config)
    trains = step in ("train", "sft")
    if not known or (trains and known[0].role != "dev"):
        required(None, "--dev (or --held-out)")
    if trains:
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
