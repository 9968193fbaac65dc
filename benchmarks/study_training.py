"""How benchmarks/study.py prepares a student and trains one method of it."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from study import GENERATED, HELD_OUT_OF_DOLLY, RESULT, Setup, read_setup
from study_cells import Method

from pocl_fast import PoclConfig, PoclTrainer
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.answers.evaluation import answer_all, references_of
from pocl_fast.answers.likelihood import cross_entropy
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.curriculum.competence import Competence
from pocl_fast.curriculum.schedule import Schedule
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import Curriculum, is_measured, make_curriculum, unmeasured_curriculum
from pocl_fast.data.encoding import SampleEncoder, encoder_of
from pocl_fast.data.sample_set import SampleSet, read_set
from pocl_fast.models.loading import load_model, load_tokenizer
from pocl_fast.models.precision import choose_precision
from pocl_fast.run.demo import bundled_data
from pocl_fast.system.files import write_json, write_text
from pocl_fast.teacher.loading import cached_teacher, load_teacher

CPU = torch.device("cpu")
MOST_HELD_OUT = 120  # samples of a set; 8 s to score
HELD_OUT_LENGTHS = {"max_length": 160, "max_prompt_length": 112}  # half of sni_3_6 has no longer prompts


def write_data(output: Path, setup: Setup) -> None:
    """The study's own files: train.jsonl, and a file for each held-out set."""
    folder = output / "prepared" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if setup.data is None:
        train, held_out = (lines_of(bundled_data(split)) for split in ("train", "dev"))
        sets = {"in-domain": held_out}
    else:
        dolly = lines_of(Path(setup.data) / "dolly_500.jsonl")
        held = set(range(0, len(dolly), max(3, len(dolly) // HELD_OUT_OF_DOLLY)))
        train = [line for i, line in enumerate(dolly) if i not in held]
        sets = {
            "in-domain": [dolly[i] for i in sorted(held)],
            "sni_3_6": lines_of(Path(setup.data) / "sni_3_6.jsonl"),
        }
    write_text(folder / "train.jsonl", "".join(train))
    for name, lines in sets.items():
        write_text(folder / f"{name}.jsonl", "".join(lines))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def prepare_all(folder: str) -> None:
    """The student, cut and fine-tuned for one pass; its difficulty; the teacher's cache."""
    output = Path(folder)
    setup, prepared = read_setup(output), output / "prepared"
    write_data(output, setup)
    data = Data(output, setup)
    if not (prepared / "student").exists():
        options = setup.options(seed=0) | {"alpha": [1.0], "temperature": [1.0], "curriculum": "none", "stages": 1}
        options |= {"epochs_per_stage": 1, "student_layers": setup.student_layers, "layer_choice": "importance"}
        arguments = PoclConfig(output_dir=str(prepared / "warm-up"), **options)
        trainer = PoclTrainer(setup.teacher, None, arguments, data.train, None, data.encoder)
        trainer.train()
        unfinished = prepared / "student.part"  # a stop while weights are written leaves no student
        trainer.save_model(str(unfinished))
        data.tokenizer.save_pretrained(unfinished)
        unfinished.rename(prepared / "student")
    teacher = data.teacher(prepared / "teacher_cache")
    teacher.fill(data.train.encoded)
    arguments = PoclConfig(output_dir=str(prepared / "difficulty"), **setup.options(seed=0))
    student = student_of(prepared / "student")
    PoclTrainer(student, teacher, arguments, data.train, None, data.encoder).planned()
    write_text(prepared / "done", "")


def student_of(folder: Path) -> Any:
    return load_model(str(folder), device=CPU).float().requires_grad_(True)


class Data:
    """The samples of a study and the tokenizer."""

    def __init__(self, output: Path, setup: Setup) -> None:
        self.setup, folder = setup, output / "prepared" / "data"
        self.tokenizer = load_tokenizer(setup.teacher)
        self.options = PoclConfig(output_dir=str(output), **setup.options(seed=0))
        self.output = output
        self.encoder = encoder_of(self.tokenizer, self.options, output, print)
        every = self._read(folder / "train.jsonl", self.options)
        self.train = evenly(every, setup.train_samples)
        self.few = evenly(self.train, setup.budget_samples)
        held_out = sorted(path for path in folder.glob("*.jsonl") if path.stem != "train")
        longer = PoclConfig(output_dir=str(output), **setup.options(seed=0) | HELD_OUT_LENGTHS)
        self.sets = {path.stem: evenly(self._read(path, longer), MOST_HELD_OUT) for path in held_out}

    def _read(self, path: Path, options: PoclConfig) -> SampleSet:
        return read_set(str(path), self.encoder, options, str(path))[0]

    def own_encoder(self) -> SampleEncoder:
        """One for a single training: where a student learns its teacher's answers, its answers end at the teacher's
        stop tokens from then on, and those of other methods do not."""
        made = encoder_of(self.tokenizer, self.options, self.output, print)
        made.has_seen((), self.encoder.longest_prompt)
        return made

    def teacher(self, cache: Path) -> Any:
        precision = choose_precision(self.setup.precision, CPU)
        model = load_teacher(self.setup.teacher, cache, precision=precision)
        return cached_teacher(
            model, cache, self.options, precision=precision, device=CPU, keep_body=True, owned=True,
            student_rows=len(self.tokenizer),
        )  # fmt: skip


def all_from_the_start(schedule: Schedule) -> Schedule:
    """Stages of the same settings and lengths, whose steps draw from all samples, as evenly as shuffled passes do."""
    steps = [schedule.planned_steps(stage.index) for stage in schedule.stages]
    return replace(schedule, stage_steps=steps, competence=Competence(initial=1.0, full=1.0))


def evenly(samples: SampleSet, count: int) -> SampleSet:
    """`count` samples, evenly over the set."""
    places = np.linspace(0, len(samples.encoded) - 1, min(count, len(samples.encoded))).astype(int)
    return replace(samples, encoded=[samples.encoded[i] for i in places])


class Bench:
    """One process of the study: what all of its trainings share is loaded once."""

    def __init__(self, output: Path, setup: Setup, number: int) -> None:
        self.output, self.setup, self.data = output, setup, Data(output, setup)
        self.locks: list[Any] = []
        cache = output / "prepared" / f"teacher_cache-{number}"  # a cache has one writer at a time
        if not cache.exists():
            unfinished = cache.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was stopped
            shutil.copytree(output / "prepared" / "teacher_cache", unfinished)
            unfinished.rename(cache)
        self.teacher = self.data.teacher(cache)
        self.scores = read_scores(
            output / "prepared/difficulty/difficulty.parquet", chosen_signals("rouge_l,cross_entropy")
        )

    def takes(self, folder: Path) -> bool:
        """Whether this process trains here: no other one does. The lock goes with the process."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.locks.append(lock)
        return not (folder / RESULT).exists()

    def train(self, method: Method, seed: int, folder: Path) -> None:
        """Trains a method from the warmed-up student with one seed, scores it, and keeps what came out."""
        start = time.perf_counter()
        train = self.data.few if method.passes else self.data.train
        arguments = PoclConfig(output_dir=str(folder / "training"), **self._options(method, seed))
        curriculum = self._curriculum(arguments, train)
        student = student_of(self.output / "prepared" / "student")
        teacher = self.teacher if method.teacher else None
        trainer = PoclTrainer(student, teacher, arguments, train, None, self.data.own_encoder(), curriculum=curriculum)
        if method.whole:
            trainer.schedule = all_from_the_start(trainer.planned())
        trainer.train()
        scored = {name: self._score(trainer, held_out) for name, held_out in self.data.sets.items()}
        for name, table in scored.items():
            pq.write_table(pa.table(table), folder / f"{name}.parquet")
        means = {name: {"rouge_l": float(np.mean(table["rouge_l"])),
                        "cross_entropy": float(np.average(table["cross_entropy"], weights=table["tokens"]))}
                 for name, table in scored.items()}  # fmt: skip
        shutil.rmtree(folder / "training")
        write_json(folder / RESULT, {
            "method": method.name, "part": method.part, "seed": seed, "options": dict(method.options),
            "steps": trainer.state.global_step, "scores": means,
            "seconds": time.perf_counter() - start,
        })  # fmt: skip

    def _options(self, method: Method, seed: int) -> dict[str, Any]:
        return self.setup.options(seed) | {"epochs_per_stage": self.setup.epochs(method)} | method.options

    def _curriculum(self, arguments: PoclConfig, train: SampleSet) -> Curriculum:
        if is_measured(arguments):
            kept = np.isin(self.scores.index, [one.index for one in train.encoded])
            scores = tuple(values[kept] for values in self.scores.scores)
            return make_curriculum(replace(self.scores, index=self.scores.index[kept], scores=scores), arguments)
        return unmeasured_curriculum(train.encoded, arguments, seed=arguments.seed)

    def _score(self, trainer: PoclTrainer, held_out: SampleSet) -> dict[str, Any]:
        """Greedy ROUGE-L (percent) and cross-entropy (nats a token) of each sample."""
        trainer.model.eval()
        references = [references_of(held_out.samples[one.index], one, self.data.encoder) for one in held_out.encoded]
        engine = TorchEngine.of(trainer.model, trainer.encoder, trainer.args)
        answers = answer_all(
            engine, held_out.encoded, trainer.encoder, max_new_tokens=GENERATED, temperature=0.0,
            seed=0, references=references,
        )  # fmt: skip
        return {
            "index": [one.index for one in held_out.encoded],
            "answer": answers,
            "rouge_l": 100 * rouge_l(answers, references).fmeasure,
            "cross_entropy": cross_entropy(trainer.model, held_out.encoded, packed=trainer.packed),
            "tokens": [one.supervised_count for one in held_out.encoded],
        }


if __name__ == "__main__":
    prepare_all(sys.argv[1])
