"""The fused distillation losses of logits: `distillation_loss`, and the same as a module."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_fast.loss import reference, row_operator
from pocl_fast.loss.arguments import IDENTITY
from pocl_fast.loss.checks import (
    Backend,
    Reduction,
    check_differentiation,
    check_overwritable,
    check_rows,
    choose_backend,
    transform,
)
from pocl_fast.loss.objective import Objective, check_objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.loss.prepared import Weighing, prepare
from pocl_fast.loss.teacher_output import TopKTeacher


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    labels: Tensor,
    objective: Objective,
    *,
    token_weights: Tensor | None = None,
    num_items: Tensor | float | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_logit_softcap: float | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
) -> LossOutput:
    """alpha · CE + (1 - alpha) · c(τ) · D of each token, reduced, with the gradient computed in the same pass.

    Args:
        student_logits: [N, V_s] or [B, T, V_s], fp32, bf16 or fp16 (float64 by the reference alone). Row i is judged
            against label i; `shift_labels` makes labels for logits that predict the next token. (`logits[:, :-1]`
            would be copied, for its rows are not evenly apart.)
        teacher_logits: [N, V_t] or [B, T, V_t], its own dtype, or a `TopKTeacher`; never differentiated. Where V_t
            differs from V_s, D compares the first min(V_s, V_t) entries, renormalised; CE is over all V_s.
        labels: [N] or [B, T] int32 or int64. A row labelled `ignore_index` is not read: loss 0, gradient exactly 0.
        objective: what to compute; see `Objective`. Its temperature and alpha are not differentiated.
        token_weights: [N] or [B, T], multiplied onto each token's loss; not differentiated.
        num_items: what "mean" divides by instead of the number of supervised tokens: the whole step's, under gradient
            accumulation or data parallelism.
        reduction: "mean" over supervised tokens, "sum", or "none" for one loss a token, [N].
        logit_scale, logit_softcap: the student's logits are softcap · tanh(scale · student_logits / softcap), or the
            scaled ones without a softcap: for the lm_head's own output of Gemma, Granite or Cohere. The gradient is
            that of student_logits. `teacher_logit_scale` and `teacher_logit_softcap` do the same for the teacher.
        inplace: write the gradient over student_logits, which saves their size in memory. Whoever reads them later
            finds the gradient; backward raises if an earlier operation needs their values or a later one changed them.
        backend: "auto" takes Triton on CUDA and ROCm, C++ on a CPU, and the reference for float64.

    A −inf logit is probability 0, on its own side alone. D then has its true value, but that terms which would be
    infinite, p · log(p / 0) and q · log(q / 0) of the KLs, are left out of its sum; it is 0 where a side is −inf alone.
    NaN or +inf makes that row's loss NaN and no other's. Without a supervised token, loss and gradient are 0.
    Arithmetic is fp32, under autocast too, the gradient in the logits' dtype; nothing synchronises with a GPU. The
    gradient is not itself differentiable, and torch.func does not go through (backend "reference" is, and does).

    Raises ValueError for shapes, dtypes or devices that do not fit, for logits that `inplace` cannot write over, and on
    a CPU for a label outside the vocabulary; on a GPU such a label is undefined, unless the process was started with
    TRITON_DEBUG=1, which makes it stop the kernel. (arXiv 2506.05695, equation 4.)
    """
    transforms = [
        *transform("logit", logit_scale, logit_softcap),
        *transform("teacher_logit", teacher_logit_scale, teacher_logit_softcap),
    ]
    check_objective(objective)
    weighing = Weighing(token_weights, num_items, reduction, ignore_index)
    return _loss(_rows(student_logits, teacher_logits, labels, transforms), objective, weighing, inplace, backend)


@dataclass(eq=False, repr=False)
class DistillationLoss(nn.Module):
    """`distillation_loss` as a module that holds its `Objective` and options."""

    objective: Objective
    _: KW_ONLY
    reduction: Reduction = "mean"
    ignore_index: int = -100
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_logit_softcap: float | None = None
    inplace: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__init__()
        check_objective(self.objective)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopKTeacher,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> LossOutput:
        """See `distillation_loss`."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            self.objective,
            token_weights=token_weights,
            num_items=num_items,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            teacher_logit_scale=self.teacher_logit_scale,
            teacher_logit_softcap=self.teacher_logit_softcap,
            inplace=self.inplace,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, reduction={self.reduction!r}"


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels [B, T] of the tokens themselves -> labels of the logits at the same places, which predict the next token.

    As `transformers` shifts: one to the left, `ignore_index` in the last place.
    """
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


class _Rows(NamedTuple):
    """The two sides' rows, views where their layout allows it."""

    given: Tensor  # the student's logits as the caller has them
    student: Tensor  # [N, V_s]
    teacher: Tensor  # [N, V_t] logits, or [N, K] log-probabilities
    indices: Tensor | None  # [N, K]: of which entries those are
    labels: Tensor  # [N]
    transforms: list[float]
    top_k: TopKTeacher | None


def _rows(student: Tensor, teacher: Tensor | TopKTeacher, labels: Tensor, transforms: list[float]) -> _Rows:
    if isinstance(teacher, TopKTeacher):
        teacher.check()
        check_rows(student, teacher.log_probs, labels, "teacher_logits.log_probs")
        if transforms[2:] != IDENTITY:
            raise ValueError("teacher_logit_scale and _softcap are of logits; a TopKTeacher has log-probabilities")
        values, indices, top_k = teacher.log_probs, _flat(teacher.indices), teacher
    else:
        check_rows(student, teacher, labels, "teacher_logits")
        values, indices, top_k = teacher, None, None
    return _Rows(student, _flat(student), _flat(values).detach(), indices, labels.reshape(-1), transforms, top_k)


def _flat(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _loss(rows: _Rows, objective: Objective, weighing: Weighing, inplace: bool, backend: Backend) -> LossOutput:
    student = rows.student
    backend = choose_backend(backend, student, rows.teacher)
    check_differentiation(backend, student)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if inplace and needs_grad:
        check_overwritable(rows.given, student, rows.teacher, backend)
    ready = prepare(
        rows.labels,
        objective,
        weighing,
        transforms=rows.transforms,
        tail="bucket" if rows.top_k is None else rows.top_k.tail,
        top_k=rows.top_k,
        V=student.shape[1],
        dtype=torch.float64 if torch.float64 in (student.dtype, rows.teacher.dtype) else torch.float32,
        half=student.dtype == torch.float16,
        backend=backend,
    )
    tokens, settings = ready.tokens, ready.settings
    if backend == "reference":
        student = student.to(tokens.temperature.dtype)
        return ready.reference_output(reference.rows_of(student, rows.teacher, rows.indices, tokens, settings))
    rows_of, rows_over = row_operator.distillation_rows, row_operator.distillation_rows_
    given: tuple[Any, ...] = (rows.teacher, *tokens, *settings[:-1])
    if rows.indices is not None:
        rows_of, rows_over = row_operator.sparse_distillation_rows, row_operator.sparse_distillation_rows_
        given = (rows.teacher, rows.indices, *tokens, *settings)
    if inplace and needs_grad:
        loss, stats = rows_over(student.detach(), *given, ready.reduced, backend)
        return ready.output(row_operator.with_gradient(loss, student, backend), stats)
    loss, stats, _ = rows_of(student, *given, needs_grad, ready.reduced, backend)
    return ready.output(loss, stats)
