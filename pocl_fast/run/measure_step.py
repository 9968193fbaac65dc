"""The measure step of a run: which samples, models and engine it takes, and what it prints of the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocl_fast.curriculum.measurer import Row, measure, measure_teacher, rows_of, unseen_by_rouge
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import TEACHER_SCORES, chosen_signals, teacher_columns
from pocl_fast.data.sample_set import SampleKeys, copies_line
from pocl_fast.data.stream import SampleStream
from pocl_fast.inspection.lengths import count_lengths
from pocl_fast.records.sources import source_of
from pocl_fast.run.context import RunContext
from pocl_fast.run_directory.directory import required
from pocl_fast.system import ranks

Pieces = Callable[[], tuple[Iterable[Sequence[Row]], int]]  # the training samples in pieces, and how many they are


def measure_step(context: RunContext) -> None:
    """Measures the student, and the teacher where a difficulty signal reads it -> difficulty.parquet,
    teacher_scores.parquet."""
    pieces = functools.cache(lambda: train_pieces(context))  # for both, once
    _measure_student(context, pieces)
    if teacher_columns(context.config.difficulty.signals):
        _measure_teacher(context, pieces)


def _measure_student(context: RunContext, pieces: Pieces) -> None:
    if not context.begins("measure", "difficulty.parquet"):
        return
    context.check_engine()
    rows, count = pieces()
    output, difficulty = context.path / "difficulty.parquet", context.config.difficulty
    with context.directory.timed("measure") as facts:
        student = context.student()
        with context.precision.autocast(), context.engine(student.model) as engine:
            measure(
                student,
                rows,
                count,
                context.encoder,
                output,
                engine=engine,
                max_new_tokens=context.config.generation.max_new_tokens,
                temperature=difficulty.measure_temperature,
                seed=difficulty.measure_seed,
                rouge_tokenizer=context.config.generation.rouge_tokenizer,
            )
        facts |= {"samples": count, **length_facts(context)}
    if line := unseen_by_rouge(output, context.config.generation.rouge_tokenizer, str(context.config.data.train)):
        context.say(line)
    rouge, loss = _means(output, "rouge_l,cross_entropy")
    context.say(
        f"measure: {count:,} training samples, ROUGE-L {100 * rouge:.2f} of 100 for the student's answers,"
        f" cross-entropy {loss:.3f} nats a token for the references"
    )


def length_facts(context: RunContext) -> dict[str, Any]:
    """What a stamp holds of the training samples, for the report: their lengths, and what reading them took away."""
    report, data = context.reports.get("--train"), context.config.data
    if report is None:
        return {}
    return {"sample_lengths": count_lengths(report.before, data).as_json(), "read": report.describe(str(data.train))}


def _measure_teacher(context: RunContext, pieces: Pieces) -> None:
    if not context.begins("measure-teacher", TEACHER_SCORES):
        return
    rows, count = pieces()
    with context.directory.timed("measure-teacher"):
        student, teacher = context.student(), context.scoring_teacher()
        with context.precision.autocast():
            measure_teacher(student, teacher, rows, count, context.path / TEACHER_SCORES)
    loss, divergence = _means(context.path / "difficulty.parquet", "teacher_cross_entropy,mean_kl")
    context.say(
        f"measure-teacher: the teacher's cross-entropy is {loss:.3f} nats a token for the references,"
        f" KL(teacher || student) {divergence:.3f}"
    )


def _means(table: Path, signals: str) -> list[float]:
    """Each signal's mean over all samples."""
    return [float(np.mean(scores)) for scores in read_scores(table, chosen_signals(signals)).scores]


def train_pieces(context: RunContext) -> tuple[Iterable[Sequence[Row]], int]:
    """The training samples in pieces, and how many they are. A large file that no step has read yet is read a piece at
    a time; before that, one reading checks all of it."""
    data = context.config.data
    source = source_of(required(data.train, "--train"))
    holds_out = not data.dev and data.held_out is not None
    if context.train_file_is_loaded or holds_out or data.data_source != "data" or not source.is_large():
        known = context.train_set
        return rows_of(known.samples, known.encoded), len(known.encoded)
    stream = SampleStream(source, context.encoder, data)
    encoder, keys = context.encoder, SampleKeys()
    report, ends, longest = ranks.from_first(lambda: (stream.check(keys.add), encoder.end_ids, encoder.longest_prompt))
    encoder.has_seen(ends, longest)  # all of the file, on every rank, before the first answer
    context.reports["--train"] = report
    context.say(report.describe(source.name))
    if line := copies_line(source.name, keys):
        context.say(line)
    ranks.from_first(lambda: context.check_stream(stream))
    return stream, report.samples
