"""The Difficulty Measurer: how hard each training sample is for this student (arXiv 2506.05695, section 3.1).

For each sample: the student's own greedy answer, its ROUGE-L against the reference, and the cross-entropy of the
reference; where a teacher is given, the teacher's cross-entropy and how far the student is from it. Written part by
part, so that an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pocl_fast.frozen import frozen_linears
from pocl_fast.generation import generate, generation_batches
from pocl_fast.heads import LmHead, lm_head
from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import Objective
from pocl_fast.packing import PackedBatch, pack, supervised_hidden, token_budget_batches
from pocl_fast.progress import progress_bar
from pocl_fast.rouge import rouge_l
from pocl_fast.samples import EncodedSample, Sample, SampleEncoder
from pocl_fast.signals import TEACHER_COLUMNS

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


def measure(
    model: Any,
    samples: Sequence[Sample],
    encoded: Sequence[EncodedSample],
    encoder: SampleEncoder,
    output: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    packed: bool,
    teacher: LoadedModel | None = None,
) -> pa.Table:
    """Measures every encoded sample and writes `output` (Parquet, the columns of `SCHEMA` and with a teacher those of
    `TEACHER_COLUMNS`), in file order.

    `samples` are those of the file, `encoded` the ones that fit. Parts that an earlier, interrupted call has written
    beside `output` are kept; the caller makes sure that they are of the same model, data and options.
    """
    parts = output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    batches = generation_batches([sample.prompt_ids for sample in encoded], batch_size)
    frozen_teacher = frozen_linears(teacher.model) if teacher else contextlib.nullcontext()
    with frozen_linears(model), frozen_teacher, progress_bar(len(encoded), "measure", "samples") as bar:
        for number, batch in enumerate(batches):
            part = parts / f"{number:06d}.parquet"
            if not part.exists():
                rows = [encoded[i] for i in batch]
                _write(_measure_batch(model, samples, rows, encoder, max_new_tokens, packed, teacher), part)
            bar.update(len(batch))
    table = pa.concat_tables([pq.read_table(parts / f"{n:06d}.parquet") for n in range(len(batches))]).sort_by("index")
    _write(table, output)
    shutil.rmtree(parts)
    return table


def _measure_batch(
    model: Any,
    samples: Sequence[Sample],
    encoded: Sequence[EncodedSample],
    encoder: SampleEncoder,
    max_new_tokens: int,
    packed: bool,
    teacher: LoadedModel | None,
) -> pa.Table:
    answers = generate(
        model,
        [sample.prompt_ids for sample in encoded],
        max_new_tokens=max_new_tokens,
        end_ids=encoder.end_ids,
        pad_id=encoder.tokenizer.pad_token_id,
        batch_size=len(encoded),
    )
    texts = [text.strip() for text in encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)]
    scores = rouge_l(texts, [list(samples[sample.index].references) for sample in encoded])
    of_responses = response_scores(LoadedModel(model, packed), encoded, teacher)
    columns = {
        "index": [sample.index for sample in encoded],
        "rouge_l": scores.fmeasure,
        "answer_length": [len(sample.response_ids) for sample in encoded],
        "prompt": [samples[sample.index].messages[-1]["content"] for sample in encoded],
        "reference": [samples[sample.index].references[0] for sample in encoded],
        "answer": texts,
        **of_responses,
    }
    schema = SCHEMA
    for name in of_responses:
        schema = schema if name in schema.names else schema.append(pa.field(name, pa.float64()))
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)
