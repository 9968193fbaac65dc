"""How likely the models find a sample's response: cross-entropies and the divergence of student and teacher, a sample.

Knows models and packed rows. Does not know answers, files or the curriculum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pocl_fast.curriculum.signals import TEACHER_COLUMNS
from pocl_fast.data.encoding import EncodedSample
from pocl_fast.data.packed import PackedBatch, pack, token_budget_batches
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.models.lm_head import LmHead, lm_head
from pocl_fast.models.packed_forward import supervised_hidden

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
