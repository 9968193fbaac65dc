"""The steps of a run: measure, rank, train, evaluate, report; `distill` is all of them in order.

Each step reads and writes files in the run directory, so that the same command goes on where an interrupted one
stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pocl_fast.answers import evaluation, vllm
from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import Curriculum, make_curriculum, stages_over
from pocl_fast.data.packed import packing_ready
from pocl_fast.data.records import EncodedSample, Sample, SampleEncoder, SampleSet, encode_all, read_samples
from pocl_fast.models import loading
from pocl_fast.models.cut import as_trainable, cut_layers, num_parameters
from pocl_fast.models.unsharded import gathered
from pocl_fast.options import RunConfig
from pocl_fast.run.configuration import from_options, recorded_config
from pocl_fast.run.directory import WRITES, RunDirectory, required
from pocl_fast.run.measure_step import measure_step
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json, write_text
from pocl_fast.training.checkpoints import checkpoints
from pocl_fast.training.metrics import read_metrics

if TYPE_CHECKING:
    from pocl_fast.answers.vllm import VllmEngine
    from pocl_fast.teacher.teacher import Teacher
    from pocl_fast.training.arguments import PoclConfig

Say = Callable[[str], None]


class Run:
    """The steps of one run, sharing what they load."""

    def __init__(self, directory: RunDirectory, config: RunConfig, say: Say = print) -> None:
        self.directory, self.config = directory, config
        self.say: Say = say if ranks.is_first() else lambda _: None
        self.path = directory.path
        self.device = loading.choose_device(config.models.device)
        self.precision = loading.choose_precision(config.models.precision, self.device)
        self._teacher_model: Any = None
        self._initial_student: Any = None

    # -- the steps --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Reads data, tokenizers and schedule, so that what is wrong with them is said before anything runs."""
        chosen_signals(self.config.difficulty.signals)
        self.check_engine()
        (_, encoded), _ = self.train_set, self.dev_set
        stages_over(np.arange(len(encoded)), np.zeros(len(encoded)), self.config.schedule)
        self._check_vocabularies()
        self.trainer_arguments()

    def trainer_arguments(self) -> PoclConfig:
        """The arguments of this run's training. Raises `InputError` for options that do not go together."""
        from pocl_fast.training.arguments import PoclConfig

        return PoclConfig.of_run(self.config, self.path / "checkpoints")

    def _check_vocabularies(self) -> None:
        chosen = self.config.models
        teacher = required(chosen.teacher, "--teacher")
        if self._student_source != teacher:
            theirs = loading.load_tokenizer(teacher, trust_remote_code=chosen.trust_remote_code)
            loading.check_same_vocabulary(self.tokenizer, theirs)

    def measure(self) -> None:
        measure_step(self)

    def rank(self) -> None:
        if not self.directory.begin("rank", self.config):
            return self.say(f"rank: done before, {self.path / 'curriculum.json'}")
        ranks.from_first(self._rank)

    def _rank(self) -> None:
        from pocl_fast.run.difficulty_report import Ranked, difficulty_figure, stage_table

        with self.directory.timed("rank"):
            known = read_scores(self.path / "difficulty.parquet", chosen_signals(self.config.difficulty.signals))
            curriculum = make_curriculum(known, self.config.schedule)
            curriculum.save(self.path / "curriculum.json")
            ranked = Ranked(known, curriculum, self.config.schedule.rrf_k)
            difficulty_figure(ranked).savefig(self.path / "difficulty.png", dpi=120)
        self.say(stage_table(ranked))
        for name, count in known.missing().items():
            self.say(f"rank: {count} of {len(known.index)} samples have no {name}; they rank last by it")
        stages = ", ".join(f"{s.size} at temperature {s.temperature:g}, alpha {s.alpha:g}" for s in curriculum.stages)
        self.say(f"rank: {len(curriculum.stages)} stages of samples: {stages}")

    def train(self) -> None:
        from pocl_fast.training.stage_flow import MetricsFile
        from pocl_fast.training.trainer import PoclTrainer

        arguments = self.trainer_arguments()
        if not self.directory.begin("train", self.config):
            return self.say(f"train: done before, {self.path / 'student'}")
        self._check_vocabularies()
        curriculum = Curriculum.load(self.path / "curriculum.json")
        train_set, dev_set = SampleSet(*self.train_set), SampleSet(*self.dev_set)
        if unknown := set(curriculum.order.tolist()) - {sample.index for sample in train_set.encoded}:
            raise InputError(
                f"{self.path / 'curriculum.json'} lists sample {min(unknown)}, which --train"
                f" {self.config.data.train} does not have: run `pocl-fast measure` and `rank` on this file first"
            )
        with self.directory.timed("train") as facts:
            student, _ = self.initial_student()
            self._initial_student = None
            sizes = [f"{num_parameters(model) / 1e6:.1f}M" for model in (student, self.teacher_model())]
            self.say(
                f"train: student {sizes[0]} parameters, teacher {sizes[1]}; {self.device.type}, {self.precision.name}"
            )
            trainer = PoclTrainer(
                as_trainable(student),
                self._cached_teacher(),
                arguments,
                train_set,
                dev_set,
                self.tokenizer,
                curriculum=curriculum,
                callbacks=[MetricsFile(self.path / "metrics.jsonl")],
            )
            trainer.train(resume_from_checkpoint=True)
            with gathered(trainer.model) as whole:
                ranks.from_first(lambda: self._save_student(whole))
            facts |= self._speed()
        if ranks.is_first():
            for checkpoint in checkpoints(self.path / "checkpoints"):  # only for going on; the best weights stay
                shutil.rmtree(checkpoint)

    def _speed(self) -> dict[str, float]:
        steps = [m for m in read_metrics(self.path / "metrics.jsonl") if "tokens" in m]
        tokens = sum(m["tokens"] for m in steps)
        seconds = sum(m["tokens"] / m["tokens_per_second"] for m in steps)
        return {"tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9)}

    def cache(self) -> None:
        """Computes what the teacher's cache lacks of the training samples."""
        self._check_vocabularies()
        _, encoded = self.train_set
        self.directory.record(self.config)
        teacher = self._cached_teacher()
        with self.precision.autocast():
            teacher.fill(encoded)
        size = teacher.cache.nbytes() / 2**20
        self.say(f"cache: {len(encoded)} samples, {size:.1f} MiB in {teacher.cache.folder}")

    def evaluate(self, when: str) -> None:
        """`when` is "before" (the student as given) or "after" (as trained)."""
        step = f"evaluate-{when}"
        if not self.directory.begin(step, self.config):
            return self.say(f"{step}: done before, {self.path / 'evaluation.json'}")
        samples, encoded = self.dev_set
        generation = self.config.generation
        with self.directory.timed(step):
            if when == "before":
                student, packed = self.initial_student()
            else:
                student, packed = self._ready(loading.load_model(str(self.path / "student"), device=self.device))
            with self.precision.autocast(), self.engine(student) as engine:
                scores, answers = evaluation.evaluate(
                    student,
                    samples,
                    encoded,
                    self.encoder,
                    seeds=self.config.evaluation.eval_seeds,
                    max_new_tokens=generation.max_new_tokens,
                    batch_size=generation.generation_batch_size,
                    batch_tokens=generation.generation_batch_tokens,
                    packed=packed,
                    engine=engine,
                    name=step,
                )
            if ranks.is_first():
                known = self.path / "evaluation.json"
                results = json.loads(known.read_text()) if known.exists() else {}
                write_json(known, results | {when: scores.to_dict()})
                self._save_answers(self.path / WRITES[step][0], samples, encoded, answers)
        self.say(
            f"{step}: ROUGE-L {scores.rouge_l:.2f} ± {scores.rouge_l_spread:.2f} over {len(scores.seeds)} seeds,"
            f" exact match {scores.exact_match:.1f} %, cross-entropy {scores.cross_entropy:.3f}"
        )

    def report(self) -> Path:
        from pocl_fast.run.report import write_report

        path = ranks.from_first(lambda: write_report(self.path))
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
        return chosen.student or required(chosen.teacher, "--teacher (or --student)")

    @cached_property
    def tokenizer(self) -> Any:
        return loading.load_tokenizer(self._student_source, trust_remote_code=self.config.models.trust_remote_code)

    @cached_property
    def encoder(self) -> SampleEncoder:
        return SampleEncoder(self.tokenizer, self.config.data.template)

    @cached_property
    def _train_data(self) -> tuple[list[Sample], list[EncodedSample]]:
        return self._read(self.config.data.train, "--train")

    @cached_property
    def train_set(self) -> tuple[list[Sample], list[EncodedSample]]:
        """The training samples; with the teacher's answers where these are asked for."""
        if self.config.data.data_source == "data":
            return self._train_data
        return self._answered_by_teacher(*self._train_data)

    def _answered_by_teacher(
        self, samples: list[Sample], encoded: list[EncodedSample]
    ) -> tuple[list[Sample], list[EncodedSample]]:
        from pocl_fast.teacher.teacher import teacher_fingerprint
        from pocl_fast.training.setup import answered_by_teacher

        self._check_vocabularies()
        model = self.teacher_model()
        options = SimpleNamespace(**asdict(self.config.generation), max_length=self.config.data.max_length)
        with self.precision.autocast():
            answered = answered_by_teacher(
                SampleSet(samples, encoded),
                model,
                self.encoder,
                self.path / "teacher_answers",
                fingerprint=teacher_fingerprint(model, self.precision.name),
                options=options,
            )
        return list(answered.samples), list(answered.encoded)

    @cached_property
    def dev_set(self) -> tuple[list[Sample], list[EncodedSample]]:
        return self._read(self.config.data.dev, "--dev")

    def _read(self, path: Path | None, option: str) -> tuple[list[Sample], list[EncodedSample]]:
        path = Path(required(path, option))
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
            from pocl_fast.teacher.loading import load_teacher

            chosen = self.config.models
            probe = self._train_data[1] if chosen.teacher_quantization != "none" else ()
            self._teacher_model = load_teacher(
                required(chosen.teacher, "--teacher"),
                self.path / "teacher",
                precision=self.precision,
                quantization=chosen.teacher_quantization,
                where=chosen.teacher_device,
                probe_samples=probe,
                trust_remote_code=chosen.trust_remote_code,
                say=self.say,
            )
        return self._teacher_model

    def resident_teacher(self) -> LoadedModel:
        """The teacher, to be asked about each sample's response."""
        self._check_vocabularies()
        return LoadedModel(*self._ready(self.teacher_model()))

    def check_engine(self) -> bool:
        """Whether vLLM answers. Raises `InputError` where it is asked for and cannot."""
        return vllm.chosen(self.config.generation.generation_engine, self.device)

    def engine(self, student: Any) -> contextlib.AbstractContextManager[VllmEngine | None]:
        """vLLM with the student in it, where vLLM answers."""
        if not self.check_engine():
            return contextlib.nullcontext()
        max_length = self.config.data.max_prompt_length + self.config.generation.max_new_tokens
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if self.precision.name == "bf16" else "float32"
        return vllm.loaded(student, max_length=max_length, dtype=dtype)

    def _cached_teacher(self) -> Teacher:
        """The teacher with its cache, which owns the model from now on, to free its body once it is cached."""
        from pocl_fast.teacher.loading import cached_teacher

        model, self._teacher_model = self.teacher_model(), None
        return cached_teacher(
            model,
            self.path / "teacher_cache",
            self.config.cache,
            precision=self.precision,
            device=self.device,
            keep_body=self.config.rollouts.rollouts != "none",
            owned=True,
            say=self.say,
        )

    def initial_student(self) -> tuple[Any, bool]:
        """The student before training, packing enabled where it holds (the second value says whether)."""
        if self._initial_student is None:
            chosen = self.config.models
            if chosen.student is None and chosen.teacher_quantization == "none":
                student = self.teacher_model()
            else:
                student = loading.load_model(
                    self._student_source, device=self.device, trust_remote_code=chosen.trust_remote_code
                )
            if chosen.student_layers is not None:
                student = cut_layers(student, chosen.student_layers)
            self._initial_student = self._ready(student.float())
        return self._initial_student

    def _ready(self, model: Any) -> tuple[Any, bool]:
        data, answer = self.config.data, self.config.generation.max_new_tokens
        loading.check_positions(model, max(data.max_length, data.max_prompt_length + answer), "student")
        with self.precision.autocast():
            return model, packing_ready(model, self.say)

    def _save_student(self, student: Any) -> None:
        partial, folder = self.path / "student.partial", self.path / "student"
        student.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)  # there if a crash came just before the stamp
        os.replace(partial, folder)

    @staticmethod
    def _save_answers(path: Path, samples: list[Sample], encoded: list[EncodedSample], answers: list[str]) -> None:
        lines = []
        for one, answer in zip(encoded, answers, strict=True):
            sample = samples[one.index]
            prompt = sample.messages[-1]["content"]
            record = {"line": sample.line, "prompt": prompt, "references": sample.references, "answer": answer}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_text(path, "".join(lines))


def open_run(output: Path, options: dict[str, Any], *, restart: bool = False, say: Say = print) -> Run:
    """The run in a folder, with `options` over what it recorded; see `RunDirectory` for `restart`."""
    directory = RunDirectory(output, restart=restart)
    return Run(directory, from_options(options, recorded_config(output)), say)
