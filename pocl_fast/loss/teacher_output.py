"""What a loss may be given as its teacher: logits, hidden states with an lm_head, or the k best of each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pocl_fast.loss.kinds import check_floating, check_tensor

Tail: TypeAlias = Literal["bucket", "renormalise"]  # what D makes of the entries that a `TopKTeacher` does not list
TAILS = get_args(Tail)
MOST_MASS = 1.1  # that K log-probabilities may have: 1, and what rounding a normaliser of 18 to bf16 adds


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

    Their exponentials add up to 1 at most. What adds up to more than 1.1 (rounding to bf16 is less) is something else,
    as probabilities or logits are: a CPU raises ValueError, on a GPU the token's loss is NaN.

    tail "bucket" compares K + 1 outcomes, the last of which is all the rest: at a temperature other than 1 the
    teacher's rest is taken as spread evenly, and where it is the rounding of fp32 log-probabilities (below 2^-23, or
    2^-20 where an entry is absent; so they must be as exact as log_softmax makes them) it is 0. "renormalise" compares
    the K entries alone, both sides normalised over them.
    """

    log_probs: Tensor
    indices: Tensor
    tail: Tail = "bucket"

    def check(self) -> None:
        """Raises TypeError or ValueError where the three cannot be, or do not fit together."""
        check_tensor("teacher.log_probs", self.log_probs)
        check_tensor("teacher.indices", self.indices)
        check_floating("teacher.log_probs", self.log_probs)
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

    def check_entries(self, counted: Tensor, V: int) -> None:
        """Raises ValueError for counted tokens whose numbers cannot be log-probabilities, or whose entries are not
        distinct ones of V; looks into the tensors, so for a CPU's alone. `counted` is [N]."""
        log_probs, indices = self.log_probs.detach().flatten(0, -2), self.indices.flatten(0, -2)
        if _plainly_entries(log_probs, indices, V):
            return
        mass = log_probs.float().exp().sum(-1)
        wrong = counted & (mass > MOST_MASS)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(_not_log_probabilities(log_probs[row].float(), float(mass[row]), row))
        present = (log_probs != -torch.inf) & counted[:, None]
        # one that is not there has a place of its own
        places = torch.where(present, indices, -1 - torch.arange(indices.shape[-1]))
        outside = present & ((indices < 0) | (indices >= V))
        if bool(outside.any()):
            row, k = outside.nonzero()[0].tolist()
            raise ValueError(
                f"index {int(indices[row, k])} of the teacher's entry {k} at token {row} is outside the student's"
                f" vocabulary of {V}"
            )
        places = places.sort(-1).values
        again = places[:, 1:] == places[:, :-1]
        if bool(again.any()):
            row, k = again.nonzero()[0].tolist()
            raise ValueError(
                f"index {int(places[row, k])} is there twice at token {row} of teacher.indices; a token's entries must"
                " be distinct (an absent one has a log-probability of -inf)"
            )


def _plainly_entries(log_probs: Tensor, indices: Tensor, V: int) -> bool:
    """Whether all are in order, ignored tokens and absent entries too: in few operations, for small batches."""
    if log_probs.numel() == 0:
        return True
    places = indices.sort(-1).values
    return (
        bool(torch.logsumexp(log_probs, -1).max() <= math.log(MOST_MASS))
        and not bool((places[:, 1:] == places[:, :-1]).any())
        and int(places[:, 0].min()) >= 0
        and int(places[:, -1].max()) < V
    )


def _not_log_probabilities(values: Tensor, mass: float, row: int) -> str:
    """What one token's values are instead, and what to give."""
    values = values[values != -torch.inf]
    if bool((values >= 0).all() & (values <= 1).all()):
        looks, instead = "look like probabilities", "give their logarithm"
    elif bool((values > 0).any()):
        looks, instead = "look like logits", "give torch.log_softmax over the whole vocabulary, of these entries"
    else:
        looks, instead = "are no log-probabilities", "give log-probabilities over the whole vocabulary at temperature 1"
    return (
        f"teacher.log_probs of token {row} {looks}: their exponentials add up to {mass:.4g}, which can be at most 1;"
        f" {instead}"
    )


TeacherOutput: TypeAlias = DenseTeacher | LinearTeacher | TopKTeacher
