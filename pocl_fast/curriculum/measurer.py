"""The Difficulty Measurer: how hard each training sample is for this student (arXiv 2506.05695, section 3.1).

Writes two tables, a row a sample. The difficulty table has the student's own answer, its ROUGE-L against the reference
and the cross-entropy of the reference. The teacher's table has the teacher's cross-entropy and the student's divergence
from it. All ranks write parts of a table, so that an interrupted measurement resumes after its last part. Knows models
and columns. Does not know how samples are ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.answers.decoding import answering_work
from pocl_fast.answers.engine import Engine
from pocl_fast.answers.evaluation import references_of
from pocl_fast.answers.likelihood import STUDENT_COLUMNS, TEACHER_COLUMNS, LoadedModel, response_scores
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.answers.rouge_words import Tokenizer, unseen_line
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.packed import token_budget_batches
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.records.samples import Sample
from pocl_fast.system.console import shared_progress
from pocl_fast.system.resumable_table import Job, make_table, pieces_of

Row: TypeAlias = tuple[Sample, EncodedSample]
Scores: TypeAlias = Callable[[Sequence[EncodedSample]], Mapping[str, np.ndarray]]  # column -> a value a sample
TEACHER_SCHEMA = pa.schema([("index", pa.int64()), *((name, pa.float64()) for name in TEACHER_COLUMNS)])
TEACHER_TOKENS = 16_384  # of the samples whose teacher columns become one part


def rows_of(samples: Sequence[Sample], encoded: Sequence[EncodedSample]) -> list[Sequence[Row]]:
    """Each encoded sample with the sample of the file that it encodes, in pieces."""
    return pieces_of([(samples[one.index], one) for one in encoded])


def measure(
    student: LoadedModel,
    pieces: Iterable[Sequence[Row]],
    count: int,
    encoder: SampleEncoder,
    output: Path,
    *,
    engine: Engine,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    rouge_tokenizer: Tokenizer = "rouge_score",
) -> None:
    """Measures the student on `count` samples and writes `output` (Parquet, the columns of `_measured`), in file order.

    `engine` generates the student's answers: greedy at `temperature` 0, else sampled with random numbers of `seed` and
    the sample's index. `pieces`, ranks and interruptions are as in `make_table`.
    """

    def plan(piece: Sequence[Row]) -> list[Job[Row]]:
        prompts = [one.prompt_ids for _, one in piece]
        return [
            Job([piece[i] for i in batch], answering_work(prompts, batch, max_new_tokens))
            for batch in engine.batches(prompts, max_new_tokens)
        ]

    def work(rows: Sequence[Row]) -> pa.Table:
        answers = engine.generate(
            [one.prompt_ids for _, one in rows],
            sample_ids=[one.index for _, one in rows],
            end_ids=encoder.end_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return _measured(student, rows, answers, encoder, rouge_tokenizer)

    with frozen_linears(student.model), shared_progress(count, "measure", "samples") as progress:
        make_table(pieces, plan, work, output, progress)


def measure_teacher(
    student: LoadedModel, teacher: LoadedModel, pieces: Iterable[Sequence[Row]], count: int, output: Path
) -> None:
    """Writes how likely the teacher finds each sample's response, and the student's divergence from it (Parquet, the
    columns of `TEACHER_SCHEMA`), in file order. `pieces`, ranks and interruptions are as in `make_table`."""

    with frozen_linears(student.model), frozen_linears(teacher.model):
        write_teacher_table(pieces, count, output, lambda encoded: response_scores(student, encoded, teacher))


def write_teacher_table(pieces: Iterable[Sequence[Row]], count: int, output: Path, scores: Scores) -> None:
    """Writes `TEACHER_COLUMNS` of `count` samples (Parquet, `TEACHER_SCHEMA`), as `scores` gives them for some; see
    `make_table`."""

    def plan(piece: Sequence[Row]) -> list[Job[Row]]:
        lengths = [len(one) for _, one in piece]
        batches = token_budget_batches(lengths, max_tokens=TEACHER_TOKENS)
        return [Job([piece[i] for i in batch], float(sum(lengths[i] for i in batch))) for batch in batches]

    def work(rows: Sequence[Row]) -> pa.Table:
        encoded = [one for _, one in rows]
        values = scores(encoded)
        columns = {"index": [one.index for one in encoded], **{name: values[name] for name in TEACHER_COLUMNS}}
        return pa.table(columns, schema=TEACHER_SCHEMA)

    with shared_progress(count, "measure the teacher", "samples") as progress:
        make_table(pieces, plan, work, output, progress)


def unseen_by_rouge(table: Path, tokenizer: Tokenizer, name: str) -> str | None:
    """The line that says for how many references of a difficulty table ROUGE-L is blind; None where it is for none."""
    parts = pq.ParquetFile(table).iter_batches(columns=["reference"])
    return unseen_line((text for part in parts for text in part["reference"].to_pylist()), tokenizer, name)


def _measured(
    student: LoadedModel,
    rows: Sequence[Row],
    answers: list[list[int]],
    encoder: SampleEncoder,
    rouge_tokenizer: Tokenizer,
) -> pa.Table:
    """The difficulty table's rows: a value a sample in each column."""
    references = [references_of(sample, one, encoder) for sample, one in rows]
    texts = encoder.answer_texts(answers, references)
    encoded = [one for _, one in rows]
    scores = response_scores(student, encoded)
    return pa.table(
        {
            "index": pa.array([one.index for one in encoded], pa.int64()),
            "rouge_l": pa.array(rouge_l(texts, references, tokenizer=rouge_tokenizer).fmeasure),
            **{name: pa.array(scores[name]) for name in STUDENT_COLUMNS},
            "answer_length": pa.array([one.supervised_count for one in encoded], pa.int64()),
            "prompt": pa.array([sample.messages[-1]["content"] for sample, _ in rows], pa.string()),
            "reference": pa.array([sample.references[0] for sample, _ in rows], pa.string()),
            "answer": pa.array(texts, pa.string()),
        }
    )
