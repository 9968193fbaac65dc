"""The Difficulty Measurer: how hard each training sample is for this student (arXiv 2506.05695, section 3.1).

For each sample: the student's own answer, its ROUGE-L against the reference, and the cross-entropy of the reference;
and, in a table of their own, the teacher's cross-entropy and how far the student is from it. Both are written part by
part by all ranks, so that an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from pocl_fast.config import Generation
from pocl_fast.frozen import frozen_linears
from pocl_fast.generation import answering_work, generate, generation_batches
from pocl_fast.heads import LmHead, lm_head
from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import Objective
from pocl_fast.packing import PackedBatch, pack, supervised_hidden, token_budget_batches
from pocl_fast.parts import Job, make_table, pieces_of
from pocl_fast.progress import shared_progress
from pocl_fast.rouge import rouge_l
from pocl_fast.samples import EncodedSample, Sample, SampleEncoder
from pocl_fast.signals import TEACHER_COLUMNS
from pocl_fast.vllm_engine import VllmEngine

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
TOKENS_A_BATCH = 4096  # of the packed cross-entropy pass
ROWS_OF_LOGITS = 256  # at a time


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model and whether packed batches hold for it."""

    model: Any
    packed: bool


def cross_entropy(model: Any, samples: Sequence[EncodedSample], *, packed: bool) -> np.ndarray:
    """Mean cross-entropy of each sample's response, in nats a token. [samples] float64."""
    return response_scores(LoadedModel(model, packed), samples)["cross_entropy"]


@torch.inference_mode()
def response_scores(
    student: LoadedModel, samples: Sequence[EncodedSample], teacher: LoadedModel | None = None
) -> dict[str, np.ndarray]:
    """What the models say of each sample's response: means over its tokens, in nats. Name -> [samples] float64.

    `cross_entropy` is the student's; with a teacher there are `teacher_cross_entropy` and `mean_kl`, the divergence
    KL(teacher || student) at temperature 1.
    """
    device = next(student.model.parameters()).device
    names = ("cross_entropy",) if teacher is None else ("cross_entropy", *TEACHER_COLUMNS)
    means = {name: np.empty(len(samples)) for name in names}
    frozen_teacher = frozen_linears(teacher.model) if teacher else contextlib.nullcontext()
    with frozen_linears(student.model), frozen_teacher:
        for group in token_budget_batches([len(sample) for sample in samples], max_tokens=TOKENS_A_BATCH):
            batch = pack([samples[i] for i in group]).to(device)
            for name, values in zip(names, _token_scores(student, teacher, batch), strict=True):
                means[name][group] = [part.double().mean().item() for part in values.cpu().split(batch.counts)]
    return means


def _token_scores(student: LoadedModel, teacher: LoadedModel | None, batch: PackedBatch) -> list[torch.Tensor]:
    """[N] cross-entropy, and with a teacher its cross-entropy and the divergence, at the supervised positions of a
    batch; a few rows of logits at a time."""
    sides = [student] if teacher is None else [student, teacher]
    heads = [(lm_head(side.model), side.model.get_output_embeddings()) for side in sides]
    hidden = [supervised_hidden(side.model.get_decoder(), batch, packed=side.packed) for side in sides]
    pieces = []
    for rows in torch.arange(len(batch.labels), device=batch.labels.device).split(ROWS_OF_LOGITS):
        labels = batch.labels[rows]
        logits = [(project(states[rows]), head) for states, (head, project) in zip(hidden, heads, strict=True)]
        # a side alone is compared with itself, for its cross-entropy
        outs = [_compared(logits[0], logits[-1], labels), *(_compared(x, x, labels) for x in logits[1:])]
        pieces.append([out["ce"] for out in outs] + [out["divergence"] for out in outs[:-1]])
    return [torch.cat(values) for values in zip(*pieces, strict=True)]


def _compared(
    student: tuple[torch.Tensor, LmHead], teacher: tuple[torch.Tensor, LmHead], labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """[N] values of the fused loss of logits, each with the head that says how they are scaled."""
    return distillation_loss(
        student[0],
        teacher[0],
        labels,
        Objective(alpha=1.0),
        reduction="none",
        logit_scale=student[1].logit_scale,
        logit_softcap=student[1].logit_softcap,
        teacher_logit_scale=teacher[1].logit_scale,
        teacher_logit_softcap=teacher[1].logit_softcap,
    ).per_token


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
    generation: Generation,
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
