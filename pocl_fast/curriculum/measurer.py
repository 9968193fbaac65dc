"""The Difficulty Measurer: how hard each training sample is for this student (arXiv 2506.05695, section 3.1).

For each sample: the student's own answer, its ROUGE-L against the reference, and the cross-entropy of the reference;
and, in a table of their own, the teacher's cross-entropy and how far the student is from it. Both are written part by
part by all ranks, so that an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

from pocl_fast.answers.decoding import answering_work, generate, generation_batches
from pocl_fast.answers.likelihood import LoadedModel, response_scores
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.answers.vllm import VllmEngine
from pocl_fast.curriculum.signals import TEACHER_COLUMNS
from pocl_fast.data.encoding import EncodedSample, SampleEncoder
from pocl_fast.data.packed import token_budget_batches
from pocl_fast.data.records import Sample
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.system.console import shared_progress
from pocl_fast.system.resumable_table import Job, make_table, pieces_of

Row: TypeAlias = tuple[Sample, EncodedSample]
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("rouge_l", pa.float64()),
        ("cross_entropy", pa.float64()),
        ("answer_length", pa.int64()),  # of the reference, as trained on
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("answer", pa.string()),
    ]
)
TEACHER_SCHEMA = pa.schema([("index", pa.int64()), *((name, pa.float64()) for name in TEACHER_COLUMNS)])
ENGINE_ROWS = 1024  # prompts that vLLM gets at once, which makes batches of its own
TEACHER_TOKENS = 16_384  # of the samples whose teacher columns become one part


class AnswerOptions(Protocol):
    """How answers are generated: a run's `Generation`, a trainer's `PoclConfig`."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def generation_batch_size(self) -> int: ...
    @property
    def generation_batch_tokens(self) -> int: ...


def rows_of(samples: Sequence[Sample], encoded: Sequence[EncodedSample]) -> list[Sequence[Row]]:
    """The encoded samples with those of the file that they are of, in pieces."""
    return pieces_of([(samples[one.index], one) for one in encoded])


def measure(
    student: LoadedModel,
    pieces: Iterable[Sequence[Row]],
    count: int,
    encoder: SampleEncoder,
    output: Path,
    *,
    generation: AnswerOptions,
    temperature: float = 0.0,
    seed: int = 0,
    engine: VllmEngine | None = None,
) -> None:
    """Measures the student on `count` samples and writes `output` (Parquet, the columns of `SCHEMA`), in file order.

    Answers are greedy at `temperature` 0, else sampled with random numbers of `seed` and the sample's index; by
    `engine`, or without one by torch. `pieces`, ranks and interruptions are as in `make_table`.
    """
    limits: dict[str, Any] = {"max_new_tokens": generation.max_new_tokens}
    sampling: dict[str, Any] = {"temperature": temperature, "seed": seed}

    def plan(piece: Sequence[Row]) -> list[Job[Row]]:
        prompts = [one.prompt_ids for _, one in piece]
        if engine:
            batches = [
                list(range(len(piece)))[start : start + ENGINE_ROWS] for start in range(0, len(piece), ENGINE_ROWS)
            ]
        else:
            sizes = {"batch_size": generation.generation_batch_size, "batch_tokens": generation.generation_batch_tokens}
            batches = generation_batches(prompts, **limits, **sizes)
        return [
            Job([piece[i] for i in batch], answering_work(prompts, batch, generation.max_new_tokens))
            for batch in batches
        ]

    def work(rows: Sequence[Row]) -> pa.Table:
        prompts, indices = [one.prompt_ids for _, one in rows], [one.index for _, one in rows]
        if engine:
            answers = engine.generate(prompts, sample_ids=indices, end_ids=encoder.end_ids, **limits, **sampling)
        else:
            answers = generate(
                student.model,
                prompts,
                sample_ids=indices,
                end_ids=encoder.end_ids,
                pad_id=encoder.tokenizer.pad_token_id,
                batch_size=len(rows),
                **limits,
                **sampling,
            )
        return _measured(student, rows, answers, encoder)

    with frozen_linears(student.model), shared_progress(count, "measure", "samples") as progress:
        make_table(pieces, plan, work, output, progress)


def measure_teacher(
    student: LoadedModel, teacher: LoadedModel, pieces: Iterable[Sequence[Row]], count: int, output: Path
) -> None:
    """Writes what the teacher says of each sample's response, and how far the student is from it (Parquet, the columns
    of `TEACHER_SCHEMA`), in file order; `pieces`, ranks and interruptions are as in `make_table`."""

    def plan(piece: Sequence[Row]) -> list[Job[Row]]:
        lengths = [len(one) for _, one in piece]
        batches = token_budget_batches(lengths, max_tokens=TEACHER_TOKENS)
        return [Job([piece[i] for i in batch], float(sum(lengths[i] for i in batch))) for batch in batches]

    def work(rows: Sequence[Row]) -> pa.Table:
        encoded = [one for _, one in rows]
        scores = response_scores(student, encoded, teacher)
        columns = {"index": [one.index for one in encoded], **{name: scores[name] for name in TEACHER_COLUMNS}}
        return pa.table(columns, schema=TEACHER_SCHEMA)

    with (
        frozen_linears(student.model),
        frozen_linears(teacher.model),
        shared_progress(count, "measure the teacher", "samples") as progress,
    ):
        make_table(pieces, plan, work, output, progress)


def _measured(student: LoadedModel, rows: Sequence[Row], answers: list[list[int]], encoder: SampleEncoder) -> pa.Table:
    texts = [text.strip() for text in encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)]
    encoded = [one for _, one in rows]
    columns = {
        "index": [one.index for one in encoded],
        "rouge_l": rouge_l(texts, [list(sample.references) for sample, _ in rows]).fmeasure,
        "cross_entropy": response_scores(student, encoded)["cross_entropy"],
        "answer_length": [len(one.response_ids) for one in encoded],
        "prompt": [sample.messages[-1]["content"] for sample, _ in rows],
        "reference": [sample.references[0] for sample, _ in rows],
        "answer": texts,
    }
    return pa.table(columns, schema=SCHEMA)
