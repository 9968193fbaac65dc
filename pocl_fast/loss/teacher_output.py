"""What a loss may be given as its teacher: logits, hidden states with an lm_head, or the k best of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Tail: TypeAlias = Literal["bucket", "renormalise"]  # what D makes of the entries that a `TopKTeacher` does not list
TAILS = get_args(Tail)


@dataclass(frozen=True, eq=False)
class DenseTeacher:
    """The teacher's logits: [N, V_t] or [B, T, V_t], any floating-point dtype.

    The distribution is softmax(softcap · tanh(scale · logits / softcap)), or of the scaled logits without a softcap. A
    logit of −inf is probability 0: logits filtered by top-k or top-p are a teacher like any other.
    """

    logits: Tensor
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """The teacher's last hidden states, after its final norm, and its lm_head: its logits are never all in memory.

    hidden: [N, H_t] or [B, T, H_t]; weight: [V_t, H_t]; bias: [V_t] or None; H_t and the dtype (one for the three)
    need not be the student's. logit_scale and logit_softcap as in `DenseTeacher`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """The teacher's K most likely entries of each token: of its distribution only K, not V, numbers are read.

    log_probs: [N, K] or [B, T, K], log-probabilities at temperature 1 over the whole vocabulary, nats; −inf for an
    absent entry, which is no outcome. indices: the same shape, int32 or int64, distinct within a token.

    tail "bucket" compares K + 1 outcomes, the last of which is all the rest: at a temperature other than 1 the
    teacher's rest is taken as spread evenly, and of no mass its probability is 0. "renormalise" compares the K entries
    alone, both sides normalised over them.
    """

    log_probs: Tensor
    indices: Tensor
    tail: Tail = "bucket"

    def check(self) -> None:
        """Raises ValueError where the three do not fit together."""
        if self.indices.shape != self.log_probs.shape or self.indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"teacher.indices must be int32 or int64 of teacher.log_probs' shape {tuple(self.log_probs.shape)};"
                f" got {self.indices.dtype} {tuple(self.indices.shape)}"
            )
        if self.indices.device != self.log_probs.device:
            raise ValueError(
                f"teacher.log_probs is on {self.log_probs.device} and teacher.indices on {self.indices.device};"
                " move them to one"
            )
        if self.tail not in TAILS:
            raise ValueError(f'teacher.tail must be "bucket" or "renormalise", got {self.tail!r}')


TeacherOutput: TypeAlias = DenseTeacher | LinearTeacher | TopKTeacher
