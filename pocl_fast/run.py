"""The run directory and the steps over it: measure, rank, train, evaluate, report; `distill` is all of them in order.

Each step reads files, writes files, and leaves a stamp of what it was made from, so that the same command goes on where an
interrupted one stopped, and a changed option never meets an old result.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocl_fast import evaluation, models
from pocl_fast.config import RunConfig, from_options, recorded_config, to_yaml
from pocl_fast.curriculum import Curriculum, baby_steps, no_curriculum, reciprocal_rank_fusion
from pocl_fast.difficulty import measure, read_difficulty
from pocl_fast.errors import InputError
from pocl_fast.packing import enable_packing, packing_error
from pocl_fast.progress import measured
from pocl_fast.samples import EncodedSample, Sample, SampleEncoder, encode_all, file_fingerprint, read_samples
from pocl_fast.student import as_trainable, cut_layers, num_parameters

Say = Callable[[str], None]

_STUDENT = ("student", "student_layers", "precision", "trust_remote_code")
_LENGTHS = ("template", "max_length", "max_prompt_length", "long_prompts")
# What each step is made from: options, and files by their content.
READS = {
    "measure": (*_STUDENT, *_LENGTHS, "max_new_tokens", "generation_batch_size", "train"),
    "rank": ("curriculum", "stages", "rrf_k", "temperature", "alpha", "difficulty.parquet"),
    "train": (
        *_STUDENT, *_LENGTHS, "teacher", "teacher_quantization", "train", "dev", "max_new_tokens", "divergence",
        "temperature_scaling", "epochs_per_stage", "batch_size", "gradient_accumulation_steps", "learning_rate",
        "weight_decay", "max_grad_norm", "cache_dtype", "seed", "curriculum.json",
    ),
    "evaluate-before": (*_STUDENT, *_LENGTHS, "dev", "max_new_tokens", "generation_batch_size", "eval_seeds"),
    "evaluate-after": (*_LENGTHS, "precision", "dev", "max_new_tokens", "generation_batch_size", "eval_seeds", "student/model.safetensors"),
}  # fmt: skip
WRITES = {
    "measure": "difficulty.parquet",
    "rank": "curriculum.json",
    "train": "student",
    "evaluate-before": "answers-before.jsonl",
    "evaluate-after": "answers-after.jsonl",
}


class RunDirectory:
    """A folder that holds one run: its configuration, the stamps of its steps, and their files."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the folder and locks it. Raises `InputError` where it holds something else, or is in use."""
        self.path = path
        if path.is_file():
            raise InputError(f"--output {path} is a file; give a folder")
        known = path / "config.yaml"
        if path.is_dir() and not known.exists() and any(p.name != ".lock" for p in path.iterdir()):
            raise InputError(f"--output {path} holds other files and is not a run; give a new or an empty folder")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / ".lock", "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another pocl-fast is working in {path}; wait for it, or give another --output") from error
        self._stamps_path = path / "steps.json"
        self.stamps: dict[str, Any] = json.loads(self._stamps_path.read_text()) if self._stamps_path.exists() else {}

    def begin(self, step: str, config: RunConfig) -> bool:
        """Whether the step is still to be done. Raises `InputError` where it was begun with other options or files."""
        made_from = self._made_from(step, config)
        stamp = self.stamps.get(step)
        output = self.path / WRITES[step]
        if stamp and (stamp["done"] is False or output.exists()):
            before = stamp["made_from"]
            changed = [name for name in made_from if before.get(name) != made_from[name]]
            if changed:
                what = "; ".join(f"{n}: was {_short(before.get(n))}, now {_short(made_from[n])}" for n in changed)
                state = "was made" if stamp["done"] else "was begun"
                raise InputError(
                    f"{self.path} holds another run: its step {step!r} {state} with other input ({what})."
                    f" Give the same options to go on, another --output for a new run, or delete {output} and"
                    f" `{step}` from {self._stamps_path.name} to do this step again"
                )
            if stamp["done"]:
                return False
        (self.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        seconds = stamp["seconds"] if stamp and not stamp["done"] else 0.0
        self.stamps[step] = {"done": False, "made_from": made_from, "seconds": seconds, "peak_bytes": 0}
        self._save_stamps()
        return True

    def note(self, step: str, *, seconds: float, peak_bytes: int, done: bool, **facts: Any) -> None:
        """Adds the time and memory of a step, and that it is done."""
        stamp = self.stamps[step]
        stamp["seconds"] += seconds
        stamp["peak_bytes"] = max(stamp["peak_bytes"], peak_bytes)
        stamp |= {"done": done, **facts}
        self._save_stamps()

    def _made_from(self, step: str, config: RunConfig) -> dict[str, Any]:
        options = config.flat()
        made_from: dict[str, Any] = {}
        for name in READS[step]:
            if name in ("train", "dev"):
                made_from[f"{name} data"] = file_fingerprint(_required(options[name], f"--{name}"))
            elif name in options:
                made_from[name] = options[name]
            elif not (self.path / name).exists():
                maker = next(s for s, output in WRITES.items() if name.split("/")[0] == output)
                raise InputError(f"{self.path / name} is not there: run `pocl-fast {maker} --output {self.path}` first")
            else:
                made_from[name] = file_fingerprint(self.path / name)
        if "student" in made_from and not made_from["student"]:
            made_from["student"] = f"cut from {options['teacher']}"
        return made_from

    def _save_stamps(self) -> None:
        write_json(self._stamps_path, self.stamps)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a temporary name, then renames: `path` is whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Run:
    """The steps of one run, sharing what they load."""

    def __init__(self, directory: RunDirectory, config: RunConfig, say: Say = print) -> None:
        self.directory, self.config, self.say = directory, config, say
        self.path = directory.path
        self.device = models.choose_device(config.models.device)
        self.precision = models.choose_precision(config.models.precision, self.device)
        self._teacher_model: Any = None
        self._initial_student: Any = None

    # -- the steps --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Reads both data sets and both tokenizers, so that what is wrong with them is said before anything runs."""
        _ = self.train_set, self.dev_set
        student, teacher = self._student_source, _required(self.config.models.teacher, "--teacher")
        if student != teacher:
            models.check_same_vocabulary(self.tokenizer, models.load_tokenizer(teacher))

    def measure(self) -> None:
        if not self.directory.begin("measure", self.config):
            return self.say(f"measure: done before, {self.path / 'difficulty.parquet'}")
        samples, encoded = self.train_set
        generation = self.config.generation
        with self._timed("measure") as facts:
            student, packed = self.initial_student()
            with self.precision.autocast():
                table = measure(
                    student,
                    samples,
                    encoded,
                    self.encoder,
                    self.path / "difficulty.parquet",
                    max_new_tokens=generation.max_new_tokens,
                    batch_size=generation.generation_batch_size,
                    packed=packed,
                )
            facts["samples"] = len(table)
        rouge = 100 * np.mean(table["rouge_l"].to_numpy())
        self.say(f"measure: {len(table)} samples, student's ROUGE-L {rouge:.2f}, cross-entropy {np.mean(table['cross_entropy'].to_numpy()):.3f}")

    def rank(self) -> None:
        if not self.directory.begin("rank", self.config):
            return self.say(f"rank: done before, {self.path / 'curriculum.json'}")
        with self._timed("rank"):
            curriculum = make_curriculum(read_difficulty(self.path / "difficulty.parquet"), self.config)
            curriculum.save(self.path / "curriculum.json")
        stages = ", ".join(f"{s.size} at temperature {s.temperature:g}, alpha {s.alpha:g}" for s in curriculum.stages)
        self.say(f"rank: {len(curriculum.stages)} stages of samples: {stages}")

    def train(self) -> None:
        from pocl_fast.teacher import Teacher
        from pocl_fast.trainer import DevSet, read_metrics, train_stages

        if not self.directory.begin("train", self.config):
            return self.say(f"train: done before, {self.path / 'student'}")
        (_, encoded), (dev_samples, dev_encoded) = self.train_set, self.dev_set
        curriculum = Curriculum.load(self.path / "curriculum.json")
        options = self.config.training
        with self._timed("train") as facts:
            student, packed = self.initial_student()
            self._initial_student = None
            teacher_model = self.teacher_model()
            enable_packing(teacher_model)
            cache_dtype = torch.bfloat16 if options.cache_dtype == "bf16" else torch.float32
            with self.precision.autocast():
                teacher = Teacher(teacher_model, self.path / "teacher_cache", cache_dtype=cache_dtype)
            sizes = [f"{num_parameters(model) / 1e6:.1f}M" for model in (student, teacher_model)]
            self.say(f"train: student {sizes[0]} parameters, teacher {sizes[1]}; {self.device.type}, {self.precision.name}")
            self._teacher_model = teacher_model = None  # its body is the Teacher's alone now, to be freed once it is cached
            dev = DevSet(dev_samples, dev_encoded, self.encoder, self.config.generation)
            train_stages(
                as_trainable(student), teacher, encoded, curriculum, dev, options, self.path, packed=packed, precision=self.precision
            )
            self._save_student(student)
            steps = [m for m in read_metrics(self.path / "metrics.jsonl") if "loss" in m]
            tokens = sum(m["tokens"] for m in steps)
            facts |= {"tokens": tokens, "tokens_per_second": tokens / sum(m["tokens"] / m["tokens_per_second"] for m in steps)}

    def evaluate(self, when: str) -> None:
        """`when` is "before" (the student as given) or "after" (as trained)."""
        step = f"evaluate-{when}"
        if not self.directory.begin(step, self.config):
            return self.say(f"{step}: done before, {self.path / 'evaluation.json'}")
        samples, encoded = self.dev_set
        generation = self.config.generation
        with self._timed(step):
            if when == "before":
                student, packed = self.initial_student()
            else:
                student, packed = self._ready(models.load_model(str(self.path / "student"), device=self.device))
            with self.precision.autocast():
                scores, answers = evaluation.evaluate(
                    student,
                    samples,
                    encoded,
                    self.encoder,
                    seeds=self.config.evaluation.eval_seeds,
                    max_new_tokens=generation.max_new_tokens,
                    batch_size=generation.generation_batch_size,
                    packed=packed,
                    name=step,
                )
            known = self.path / "evaluation.json"
            results = json.loads(known.read_text()) if known.exists() else {}
            write_json(known, results | {when: scores.to_dict()})
            self._save_answers(self.path / WRITES[step], samples, encoded, answers)
        self.say(
            f"{step}: ROUGE-L {scores.rouge_l:.2f} ± {scores.rouge_l_spread:.2f} over {len(scores.seeds)} seeds,"
            f" exact match {scores.exact_match:.1f} %, cross-entropy {scores.cross_entropy:.3f}"
        )

    def report(self) -> Path:
        from pocl_fast.report import write_report

        path = write_report(self.path)
        self.say(f"report: {path}")
        return path

    def distill(self) -> Path:
        """Every step in order; those done before are passed over."""
        self.check()
        self.measure()
        self.evaluate("before")
        self.rank()
        self.train()
        self.evaluate("after")
        return self.report()

    # -- what they share --------------------------------------------------------------------------------------------

    @property
    def _student_source(self) -> str:
        chosen = self.config.models
        if chosen.student is None and chosen.student_layers is None:
            raise InputError("give --student, or --student-layers to cut one from the teacher")
        return chosen.student or _required(chosen.teacher, "--teacher (or --student)")

    @cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(self._student_source, trust_remote_code=self.config.models.trust_remote_code)

    @cached_property
    def encoder(self) -> SampleEncoder:
        return SampleEncoder(self.tokenizer, self.config.data.template)

    @cached_property
    def train_set(self) -> tuple[list[Sample], list[EncodedSample]]:
        return self._read(self.config.data.train, "--train")

    @cached_property
    def dev_set(self) -> tuple[list[Sample], list[EncodedSample]]:
        return self._read(self.config.data.dev, "--dev")

    def _read(self, path: Path | None, option: str) -> tuple[list[Sample], list[EncodedSample]]:
        path = Path(_required(path, option))
        data = self.config.data
        samples = read_samples(path)
        encoded, report = encode_all(
            samples,
            self.encoder,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            long_prompts=data.long_prompts,
            name=str(path),
        )
        self.say(report.describe(str(path)))
        return samples, encoded

    def teacher_model(self) -> Any:
        """The teacher, loaded once and kept until training takes it."""
        if self._teacher_model is None:
            chosen = self.config.models
            teacher = _required(chosen.teacher, "--teacher")
            self.say(f"loading the teacher {teacher}" + (f" in {q}" if (q := chosen.teacher_quantization) != "none" else ""))
            self._teacher_model = models.load_model(
                teacher,
                dtype=torch.bfloat16 if self.device.type == "cuda" and self.precision.name == "bf16" else torch.float32,
                device=self.device,
                quantization=chosen.teacher_quantization,
                trust_remote_code=chosen.trust_remote_code,
            )
        return self._teacher_model

    def initial_student(self) -> tuple[Any, bool]:
        """The student before training, packing enabled where it holds (the second value says whether)."""
        if self._initial_student is None:
            chosen = self.config.models
            if chosen.student is None and chosen.teacher_quantization == "none":
                student = self.teacher_model()
            else:
                student = models.load_model(self._student_source, device=self.device, trust_remote_code=chosen.trust_remote_code)
            if chosen.student_layers is not None:
                student = cut_layers(student, chosen.student_layers)
            self._initial_student = self._ready(student.float())
        return self._initial_student

    def _ready(self, model: Any) -> tuple[Any, bool]:
        enable_packing(model)
        packed = packing_error(model, model.config.vocab_size) < 1e-2
        if not packed:
            self.say(f"{type(model).__name__} does not support packed batches: they are padded instead, which is slower")
        return model, packed

    def _save_student(self, student: Any) -> None:
        partial = self.path / "student.partial"
        student.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        os.replace(partial, self.path / "student")

    @staticmethod
    def _save_answers(path: Path, samples: list[Sample], encoded: list[EncodedSample], answers: list[str]) -> None:
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            for one, answer in zip(encoded, answers, strict=True):
                sample = samples[one.index]
                prompt = sample.messages[-1]["content"]
                record = {"line": sample.line, "prompt": prompt, "references": sample.references, "answer": answer}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, path)

    def _timed(self, step: str) -> _TimedStep:
        return _TimedStep(self.directory, step)


class _TimedStep:
    """Stamps a step with its time and memory when it ends, and as not done when it fails."""

    def __init__(self, directory: RunDirectory, step: str) -> None:
        self.directory, self.step = directory, step
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> dict[str, Any]:
        self._measured = measured()
        self._usage = self._measured.__enter__()
        return self.facts

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._measured.__exit__(kind, error, trace)
        usage = self._usage
        self.directory.note(self.step, seconds=usage.seconds, peak_bytes=usage.peak_bytes, done=kind is None, **self.facts)


def make_curriculum(difficulty: Any, config: RunConfig) -> Curriculum:
    """Stages of the samples in a difficulty table, by reciprocal rank fusion of ROUGE-L and cross-entropy."""
    schedule = config.schedule
    index = difficulty["index"].to_numpy()
    if schedule.curriculum == "none":
        plain = no_curriculum(len(index), temperature=schedule.temperature[0], alpha=schedule.alpha[0])
        return replace(plain, order=index)
    fused = reciprocal_rank_fusion(
        [difficulty["rouge_l"].to_numpy(), difficulty["cross_entropy"].to_numpy()], descending=[True, False], k=schedule.rrf_k
    )
    return baby_steps(
        index[fused.order],  # samples that were skipped leave gaps in the index
        fused.score[fused.order],
        stages=schedule.stages,
        temperatures=schedule.temperature,
        alphas=schedule.alpha,
    )


def open_run(output: Path, options: dict[str, Any], say: Say = print) -> Run:
    """The run in a folder, with `options` over what it recorded."""
    directory = RunDirectory(output)
    return Run(directory, from_options(options, recorded_config(output)), say)


def _required(value: Any, option: str) -> Any:
    if value is None:
        raise InputError(f"{option} is missing")
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 and " " not in text else text
