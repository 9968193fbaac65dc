"""The measure step of a run: which samples, which models and engine, and what is said of the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.curriculum.measurer import Row, measure, measure_teacher, rows_of
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import TEACHER_SCORES, chosen_signals, teacher_columns
from pocl_fast.data.stream import SampleStream
from pocl_fast.run.directory import required
from pocl_fast.system import ranks

if TYPE_CHECKING:
    from pocl_fast.run.steps import Run

IN_MEMORY = 1 << 28  # bytes; a larger file of training samples is read in pieces, where it would take ten times as much
Pieces = Callable[[], tuple[Iterable[Sequence[Row]], int]]  # the training samples in pieces, and how many they are


def measure_step(run: Run) -> None:
    """Measures the student, and the teacher where a difficulty signal reads it; what was done before is passed over."""
    pieces = functools.cache(lambda: train_pieces(run))  # for both, once
    _measure_student(run, pieces)
    if teacher_columns(run.config.difficulty.signals):
        _measure_teacher(run, pieces)


def _measure_student(run: Run, pieces: Pieces) -> None:
    output = run.path / "difficulty.parquet"
    if not run.directory.begin("measure", run.config):
        return run.say(f"measure: done before, {output}")
    run.check_engine()
    rows, count = pieces()
    difficulty = run.config.difficulty
    with run.directory.timed("measure") as facts:
        student = LoadedModel(*run.initial_student())
        with run.precision.autocast(), run.engine(student.model) as engine:
            measure(
                student,
                rows,
                count,
                run.encoder,
                output,
                engine=engine,
                max_new_tokens=run.config.generation.max_new_tokens,
                temperature=difficulty.measure_temperature,
                seed=difficulty.measure_seed,
            )
        facts["samples"] = count
    known = read_scores(output, chosen_signals("rouge_l,cross_entropy"))
    rouge, loss = (float(np.mean(scores)) for scores in known.scores)
    run.say(f"measure: {count} samples, student's ROUGE-L {100 * rouge:.2f}, cross-entropy {loss:.3f}")


def _measure_teacher(run: Run, pieces: Pieces) -> None:
    output = run.path / TEACHER_SCORES
    if not run.directory.begin("measure-teacher", run.config):
        return run.say(f"measure-teacher: done before, {output}")
    rows, count = pieces()
    with run.directory.timed("measure-teacher"):
        student, teacher = LoadedModel(*run.initial_student()), run.resident_teacher()
        with run.precision.autocast():
            measure_teacher(student, teacher, rows, count, output)
    known = read_scores(run.path / "difficulty.parquet", chosen_signals("teacher_cross_entropy,mean_kl"))
    loss, divergence = (float(np.mean(scores)) for scores in known.scores)
    run.say(f"measure-teacher: cross-entropy {loss:.3f}, KL(teacher || student) {divergence:.3f}")


def train_pieces(run: Run) -> tuple[Iterable[Sequence[Row]], int]:
    """The training samples in pieces, and how many they are. A large file that nobody has read yet is read a piece at a
    time, once before to check all of it."""
    data = run.config.data
    path = Path(required(data.train, "--train"))
    whole = "train_set" in vars(run) or data.data_source != "data" or not path.is_file()
    if whole or path.stat().st_size < IN_MEMORY:
        samples, encoded = run.train_set
        return rows_of(samples, encoded), len(encoded)
    stream = SampleStream(path, run.encoder, data.max_length, data.max_prompt_length, data.long_prompts)
    report = ranks.from_first(stream.check)
    run.say(report.describe(str(path)))
    return stream, report.samples
