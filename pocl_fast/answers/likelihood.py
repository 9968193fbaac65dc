"""How likely student and teacher find each sample's answers: means over their tokens of what the fused loss computes.

Knows models, packed rows and the names of these means, which are columns of the difficulty tables. Does not know
answers, files or the curriculum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import PackedBatch, Rows, pack, token_budget_batches
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.models.lm_head import LmHead, lm_head
from pocl_fast.models.packed_forward import decoder_of, supervised_hidden
from pocl_fast.models.placement import input_device, output_device
from pocl_fast.system import console

TOKENS_A_BATCH = 4096  # of a packed batch
ROWS_OF_LOGITS = 256  # at a time
KEPT_BYTES = 1 << 28  # at most so many of a model's hidden states are kept

TokenValues: TypeAlias = Mapping[str, torch.Tensor]  # `LossOutput.per_token`: name -> [N]

# Column -> the value of each token that it is the mean of. `student` compares the student with the teacher, or with
# itself where there is no teacher.
STUDENT_COLUMNS: dict[str, Callable[[TokenValues], torch.Tensor]] = {
    "cross_entropy": lambda student: student["ce"],
}
# The same of columns that need a teacher; `teacher` compares the teacher with itself.
TEACHER_COLUMNS: dict[str, Callable[[TokenValues, TokenValues], torch.Tensor]] = {
    "teacher_cross_entropy": lambda student, teacher: teacher["ce"],
    "mean_kl": lambda student, teacher: student["divergence"],
}


class KeptStates:
    """The final hidden states of one model at the supervised positions of samples, kept in main memory for the next
    time that they are scored, as long as there is room in `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._states: dict[bytes, torch.Tensor] = {}  # by a sample's fingerprint
        self._bytes = 0
        self._refused: set[bytes] = set()
        self._said = False

    def has(self, samples: Sequence[EncodedSample]) -> bool:
        """Whether those of all samples are kept."""
        return all(sample.fingerprint in self._states for sample in samples)

    def read(self, samples: Sequence[EncodedSample]) -> torch.Tensor:
        """[N, H], in the order of the samples, on the CPU."""
        return torch.cat([self._states[sample.fingerprint] for sample in samples])

    def keep(self, samples: Sequence[EncodedSample], states: torch.Tensor) -> None:
        """Keeps the [N, H] states of the samples, where there is room for them."""
        keys = [sample.fingerprint for sample in samples]
        if states.nbytes > KEPT_BYTES - self._bytes:
            self._refused |= set(keys)
            return
        self._bytes += states.nbytes
        parts = states.cpu().split([sample.supervised_count for sample in samples])
        self._states |= zip(keys, parts, strict=True)

    def lacking(self) -> str | None:
        """The line that says for how many samples there was no room; None where for all, or where it was said."""
        if not self._refused or self._said:
            return None
        self._said = True
        count, limit = len(self._refused), console.size(KEPT_BYTES)
        return f"hidden states of {count:,} held-out samples do not fit in {limit}: computed at each evaluation"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model and whether packed batches hold for it; `kept` is for one that does not change and is
    scored on the same samples more than once."""

    model: Any
    packed: Rows | bool
    kept: KeptStates | None = None

    def hidden(self, samples: Sequence[EncodedSample], batch: PackedBatch) -> torch.Tensor:
        """[N, H] final hidden states at the supervised positions of a batch, which is packed of the samples."""
        if self.kept is not None and self.kept.has(samples):
            return self.kept.read(samples).to(output_device(self.model))
        states = supervised_hidden(decoder_of(self.model), batch.to(input_device(self.model)), packed=self.packed)
        if self.kept is not None:
            self.kept.keep(samples, states)
        return states

    def frozen(self, samples: Sequence[EncodedSample]) -> contextlib.AbstractContextManager[None]:
        """The context in which the samples are scored: all linear layers are frozen, or the lm_head alone where the
        states of every sample are kept."""
        lm_head_alone = self.kept is not None and self.kept.has(samples)
        return frozen_linears(self.model.get_output_embeddings() if lm_head_alone else self.model)


def cross_entropy(model: Any, samples: Sequence[EncodedSample], *, packed: Rows | bool) -> np.ndarray:
    """Mean cross-entropy of each sample's supervised tokens, in nats a token. [samples] float64."""
    return response_scores(LoadedModel(model, packed), samples)["cross_entropy"]


@torch.inference_mode()
def response_scores(
    student: LoadedModel,
    samples: Sequence[EncodedSample],
    teacher: LoadedModel | None = None,
    *,
    progress: console.Report | None = None,
) -> dict[str, np.ndarray]:
    """Means over the supervised tokens of each sample, in nats. Column -> [samples] float64.

    The columns are `STUDENT_COLUMNS`: `cross_entropy` is the student's; and with a teacher `TEACHER_COLUMNS`:
    `teacher_cross_entropy`, and `mean_kl`, which is KL(teacher || student) at temperature 1. `progress` is called
    with how many more samples are done.
    """
    device = next(student.model.parameters()).device
    names = (*STUDENT_COLUMNS, *(TEACHER_COLUMNS if teacher else ()))
    means = {name: np.empty(len(samples)) for name in names}
    with student.frozen(samples), teacher.frozen(samples) if teacher else contextlib.nullcontext():
        for group in token_budget_batches([len(sample) for sample in samples], max_tokens=TOKENS_A_BATCH):
            some = [samples[i] for i in group]
            batch = pack(some).to(device)
            for name, values in zip(names, _token_scores(student, teacher, some, batch), strict=True):
                means[name][group] = [part.double().mean().item() for part in values.cpu().split(batch.counts)]
            if progress:
                progress(len(group))
    return means


def _token_scores(
    student: LoadedModel, teacher: LoadedModel | None, samples: Sequence[EncodedSample], batch: PackedBatch
) -> list[torch.Tensor]:
    """[N] each, in the order of the columns: their values at the supervised positions of a batch of the samples. A few
    rows of logits are in memory at a time."""
    sides = [student] if teacher is None else [student, teacher]
    heads = [(lm_head(side.model), side.model.get_output_embeddings()) for side in sides]
    hidden = [side.hidden(samples, batch) for side in sides]
    pieces = []
    for start in range(0, len(batch.labels), ROWS_OF_LOGITS):
        rows = slice(start, start + ROWS_OF_LOGITS)
        labels = batch.labels[rows]
        logits = [  # a teacher may lie on other devices than the student
            (project(states[rows]).to(labels.device), head)
            for states, (head, project) in zip(hidden, heads, strict=True)
        ]
        of_student = _compared(logits[0], logits[-1], labels)
        values = [value(of_student) for value in STUDENT_COLUMNS.values()]
        if teacher:
            of_teacher = _compared(logits[1], logits[1], labels)
            values += [value(of_student, of_teacher) for value in TEACHER_COLUMNS.values()]
        pieces.append(values)
    return [torch.cat(values) for values in zip(*pieces, strict=True)]


def _compared(
    student: tuple[torch.Tensor, LmHead], teacher: tuple[torch.Tensor, LmHead], labels: torch.Tensor
) -> TokenValues:
    """The fused loss's values of each token, for two sides' logits [N, V], each with the head that says how they are
    scaled."""
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
