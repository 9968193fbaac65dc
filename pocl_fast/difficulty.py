"""The Difficulty Measurer: how hard each training sample is for this student (arXiv 2506.05695, section 3.1).

For each sample: the student's own greedy answer, its ROUGE-L against the reference, and the cross-entropy of the
reference. Written part by part, so that an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pocl_fast.errors import InputError
from pocl_fast.frozen import frozen_linears
from pocl_fast.generation import generate, generation_batches
from pocl_fast.heads import lm_head
from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import Objective
from pocl_fast.packing import PackedBatch, pack, supervised_hidden, token_budget_batches
from pocl_fast.progress import progress_bar
from pocl_fast.rouge import rouge_l
from pocl_fast.samples import EncodedSample, Sample, SampleEncoder

SCHEMA = pa.schema(
    [("index", pa.int64()), ("rouge_l", pa.float64()), ("cross_entropy", pa.float64()), ("answer", pa.string())]
)
TOKENS_A_BATCH = 4096  # of the packed cross-entropy pass
ROWS_OF_LOGITS = 256  # at a time


@torch.inference_mode()
def cross_entropy(model: Any, samples: Sequence[EncodedSample], *, packed: bool) -> np.ndarray:
    """Mean cross-entropy of each sample's response, in nats a token. [samples] float64."""
    device = next(model.parameters()).device
    means = np.empty(len(samples))
    with frozen_linears(model):
        for group in token_budget_batches([len(sample) for sample in samples], max_tokens=TOKENS_A_BATCH):
            batch = pack([samples[i] for i in group]).to(device)
            losses = _token_cross_entropy(model, batch, packed=packed)
            means[group] = [part.double().mean().item() for part in losses.cpu().split(batch.counts)]
    return means


def _token_cross_entropy(model: Any, batch: PackedBatch, *, packed: bool) -> torch.Tensor:
    """[N] cross-entropy at the supervised positions of a batch, a few rows of logits at a time."""
    head, project = lm_head(model), model.get_output_embeddings()
    hidden = supervised_hidden(model.get_decoder(), batch, packed=packed)
    losses = []
    for rows, labels in zip(hidden.split(ROWS_OF_LOGITS), batch.labels.split(ROWS_OF_LOGITS), strict=True):
        logits = project(rows)
        out = distillation_loss(  # its cross-entropy alone: the student stands in for the teacher
            logits,
            logits,
            labels,
            Objective(alpha=1.0),
            reduction="none",
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
        )
        losses.append(out.per_token["ce"])
    return torch.cat(losses)


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
) -> pa.Table:
    """Measures every encoded sample and writes `output` (Parquet: index, rouge_l, cross_entropy, answer), in file
    order.

    `samples` are those of the file, `encoded` the ones that fit. Parts that an earlier, interrupted call has written
    beside `output` are kept; the caller makes sure that they are of the same model, data and options.
    """
    parts = output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    batches = generation_batches([sample.prompt_ids for sample in encoded], batch_size)
    with frozen_linears(model), progress_bar(len(encoded), "measure", "samples") as bar:
        for number, batch in enumerate(batches):
            part = parts / f"{number:06d}.parquet"
            if not part.exists():
                rows = [encoded[i] for i in batch]
                _write(_measure_batch(model, samples, rows, encoder, max_new_tokens, packed), part)
            bar.update(len(batch))
    table = pa.concat_tables([pq.read_table(parts / f"{n:06d}.parquet") for n in range(len(batches))]).sort_by("index")
    _write(table, output)
    shutil.rmtree(parts)
    return table


def read_difficulty(path: Path) -> pa.Table:
    """The table that `measure` wrote. Raises `InputError` where it is missing or not such a table."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there: run `pocl-fast measure` first") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run `pocl-fast measure` again") from error
    if missing := {"index", "rouge_l", "cross_entropy"} - set(table.column_names):
        raise InputError(f"{path} lacks the columns {sorted(missing)}")
    return table


def _measure_batch(
    model: Any,
    samples: Sequence[Sample],
    encoded: Sequence[EncodedSample],
    encoder: SampleEncoder,
    max_new_tokens: int,
    packed: bool,
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
    columns = [
        [sample.index for sample in encoded],
        scores.fmeasure,
        cross_entropy(model, encoded, packed=packed),
        texts,
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)
