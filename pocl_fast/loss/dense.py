"""The fused distillation losses: the public functions, with every check of their arguments."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pocl_fast.loss import reference, row_operator, sparse_operator
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import TopKTeacher

Backend: TypeAlias = Literal["auto", "triton", "cpp", "reference"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a kernel knows of a token beside its loss: the rows of `LossOutput.stats` after the first
STATS = ("ce", "divergence", "student_entropy", "teacher_entropy", "accuracy", "agreement")


@dataclass(frozen=True)
class LossOutput:
    """A loss and what the same pass knows besides: tensors on the logits' device, all but `loss` detached.

    Means are computed where they are asked for, so that a step which logs nothing does not pay for them."""

    loss: Tensor  # 0-d, or [N] with reduction "none"
    num_tokens: Tensor  # 0-d: supervised tokens
    stats: Tensor = field(repr=False)  # [7, N] of each token: see `reference.Rows`

    @property
    def ce(self) -> Tensor:
        """0-d: mean cross-entropy over supervised tokens, nats."""
        return self._mean(self.stats[1])

    @property
    def divergence(self) -> Tensor:
        """0-d: mean divergence over supervised tokens, without its temperature factor, nats."""
        return self._mean(self.stats[2])

    @property
    def metrics(self) -> dict[str, Tensor]:
        """student_entropy, teacher_entropy (nats), accuracy, agreement: 0-d means over supervised tokens."""
        return dict(zip(STATS[2:], self._mean(self.stats[3:]).unbind(), strict=True))

    @property
    def per_token(self) -> dict[str, Tensor]:
        """[N] each: ce, divergence, student_entropy, teacher_entropy, accuracy, agreement; 0 for ignored tokens."""
        return dict(zip(STATS, self.stats[1:].unbind(), strict=True))

    def _mean(self, rows: Tensor) -> Tensor:
        return rows.sum(-1) / self.num_tokens.clamp_min(1)


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
            against label i: see `shift_labels` for logits that predict the next token. (`logits[:, :-1]` would be
            copied, for its rows are not evenly apart.)
        teacher_logits: [N, V_t] or [B, T, V_t], its own dtype; never differentiated. Where V_t differs from V_s, D
            compares the first min(V_s, V_t) entries, renormalised there; CE is over the student's own V_s. Or a
            `TopKTeacher`, of which K numbers a token are read.
        labels: [N] or [B, T] int32 or int64; rows whose label is `ignore_index` cost nothing: loss 0, gradient
            exactly 0, the logits are not read.
        objective: what to compute; see `Objective`. Its temperature and alpha are not differentiated.
        token_weights: [N] or [B, T], multiplied onto each token's loss; not differentiated.
        num_items: what "mean" divides by instead of the number of supervised tokens: the whole step's, under gradient
            accumulation or data parallelism.
        reduction: "mean" over supervised tokens, "sum", or "none" for one loss a token ([N]). Whatever it is,
            `per_token` of the result holds each token's ce, divergence, entropies, accuracy and agreement, [N] each.
        logit_scale, logit_softcap: the student's logits are softcap · tanh(scale · student_logits / softcap), or the
            scaled ones without a softcap: for the lm_head's own output of Gemma, Granite or Cohere. The gradient is
            that of student_logits. `teacher_logit_scale`, `teacher_logit_softcap`: the teacher's, apart.
        inplace: write the gradient over student_logits, which saves their size in memory. Whoever reads them later
            finds the gradient; backward raises if an earlier operation needs their values or a later one changed them.
        backend: "auto" takes Triton on CUDA and ROCm, C++ on a CPU, and the reference for float64.

    A −inf logit on either side leaves its entry out of D. Any other NaN or +inf makes that row's loss NaN and no
    other's. No supervised token: loss 0, gradient 0. Arithmetic is fp32, the gradient in the logits' dtype; nothing
    synchronises with a GPU. The gradient is not itself differentiable, and torch.func does not go through (backend
    "reference" is, and does).

    Under autocast the logits are taken in the dtype that they have, and the loss is fp32.

    Raises ValueError for shapes, dtypes or devices that do not fit, for logits that `inplace` cannot write over, and on
    a CPU for a label outside the vocabulary; on a GPU such a label is undefined, but for a process started with
    TRITON_DEBUG=1, where it stops the kernel. (arXiv 2506.05695, equation 4.)
    """
    top_k: TopKTeacher | None = None
    if not isinstance(teacher_logits, TopKTeacher):
        student, teacher, labels = _as_rows(student_logits, teacher_logits, labels)
    else:
        top_k = teacher_logits
        top_k.check()
        student, teacher, labels = _as_rows(student_logits, top_k.log_probs, labels, "teacher_logits.log_probs")
        if (teacher_logit_scale, teacher_logit_softcap) != (1.0, None):
            raise ValueError("teacher_logit_scale and _softcap are of logits; a TopKTeacher has log-probabilities")
    backend = _choose_backend(backend, student, teacher)
    if backend != "reference":
        _check_differentiation(student)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    inplace = inplace and needs_grad
    if inplace:
        _check_overwritable(student_logits, student, teacher, backend)
    N = labels.numel()
    counted = labels != ignore_index
    if backend != "cpp" and labels.device.type == "cpu" and not torch.compiler.is_compiling():  # C++ looks for itself
        row_operator.check_labels(labels, counted, student.shape[1])
    num_tokens = counted.sum()
    # fp32 but for the reference in float64, which must not round 1.33
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    divisor = _divisor(reduction, num_items, num_tokens)
    # of a mean most of fp16's gradient would be below its smallest number before a GradScaler has made it larger
    late = student.dtype == torch.float16 and backend != "reference"
    row_scale = _token_weights(token_weights, N, student.device, dtype)
    row_scale = row_scale if late else row_scale / divisor
    temperature = _per_token("temperature", objective.temperature, N, student.device, dtype)
    alpha = _per_token("alpha", objective.alpha, N, student.device, dtype)

    student_transform = _transform("logit", logit_scale, logit_softcap)
    teacher_transform = _transform("teacher_logit", teacher_logit_scale, teacher_logit_softcap)
    teacher_rows = [teacher.detach()] if top_k is None else [teacher.detach(), _rows(top_k.indices)]
    if backend == "reference":
        options: dict[str, Any] = {
            "divergence": objective.family,
            "teacher_share": objective.teacher_share,
            "temperature_power": objective.temperature_power,
            "ignore_index": ignore_index,
            "student_transform": student_transform,
        }
        given = (student.to(dtype), *teacher_rows, labels, temperature, alpha)
        if top_k is None:
            rows = reference.distillation_rows(*given, **options, teacher_transform=teacher_transform)
        else:
            rows = reference.sparse_distillation_rows(*given, **options, tail=top_k.tail)
        loss = rows.loss * torch.where(counted, row_scale, 0.0)
        loss = loss if reduction == "none" else loss.sum()
        stats = torch.stack([value.detach() for value in rows])
    else:
        tensors = (*teacher_rows, labels, temperature, alpha, row_scale.float().contiguous())
        reduced = reduction != "none"
        settings: tuple[Any, ...] = (
            objective.family,
            objective.teacher_share,
            objective.temperature_power,
            ignore_index,
        )
        rows_of: Any = row_operator.distillation_rows
        rows_over: Any = row_operator.distillation_rows_
        if top_k is None:
            settings += ([*student_transform, *teacher_transform],)
        else:
            rows_of, rows_over = sparse_operator.sparse_distillation_rows, sparse_operator.sparse_distillation_rows_
            settings += (top_k.tail, list(student_transform))
        if inplace:
            loss, stats = rows_over(student.detach(), *tensors, *settings, reduced, backend)
            loss = row_operator.with_gradient(loss, student, backend)
        else:
            loss, stats, _ = rows_of(student, *tensors, *settings, needs_grad, reduced, backend)
        if late:
            loss = loss / divisor
    return LossOutput(loss, num_tokens, stats.detach())


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


def _as_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, name: str = "teacher_logits"
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments as [N, V_s], [N, V_t], [N], views where their layout allows it."""
    if student.dim() not in (2, 3):
        raise ValueError(f"student_logits must be [N, V] or [B, T, V], got shape {tuple(student.shape)}")
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and {name} {tuple(teacher.shape)} must be of the same"
            " tokens: all but the last dimension must be equal"
        )
    if labels.shape != student.shape[:-1]:
        raise ValueError(f"labels must be {tuple(student.shape[:-1])}, one a row of logits; got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be int32 or int64, got {labels.dtype}")
    if student.shape[-1] == 0 or teacher.shape[-1] == 0:
        raise ValueError(f"the vocabulary is empty: student_logits and {name} need at least one column")
    if not (student.device == teacher.device == labels.device):
        raise ValueError(
            f"student_logits, {name} and labels are on {student.device}, {teacher.device} and {labels.device};"
            " move them to one"
        )
    return _rows(student), _rows(teacher), labels.reshape(-1)


def _rows(logits: Tensor) -> Tensor:
    rows = logits.flatten(0, -2)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _choose_backend(backend: Backend, student: Tensor, teacher: Tensor) -> Backend:
    dtypes = {student.dtype, teacher.dtype}
    if not dtypes <= {*_FUSED_DTYPES, torch.float64}:
        raise ValueError(f"logits must be fp32, bf16, fp16 or float64, got {student.dtype} and {teacher.dtype}")
    if backend == "auto":
        if torch.float64 in dtypes:
            return "reference"
        by_device: dict[str, Backend] = {"cuda": "triton", "cpu": "cpp"}
        return by_device.get(student.device.type, "reference")
    if backend not in ("triton", "cpp", "reference"):
        raise ValueError(f'backend must be "auto", "triton", "cpp" or "reference", got {backend!r}')
    if backend != "reference" and not dtypes <= set(_FUSED_DTYPES):
        raise ValueError(
            f"backend {backend!r} takes fp32, bf16 and fp16 logits, got {student.dtype} and {teacher.dtype}"
        )
    if backend == "cpp" and student.device.type != "cpu":
        raise ValueError(f'backend "cpp" takes CPU tensors, got {student.device}')
    return backend


def _check_differentiation(*inputs: Tensor) -> None:
    """Raises for what the fused gradient, which backward alone gives, would be missing from."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for tensor in inputs:
        while functorch.is_batchedtensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        if functorch.is_gradtrackingtensor(tensor):
            kind = "torch.func's grad, vjp and jvp"
        elif forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            kind = "forward-mode differentiation"
        else:
            continue
        raise RuntimeError(f"the fused losses do not know {kind}: call backward(), or pass backend='reference'")


def _check_overwritable(logits: Tensor, rows: Tensor, teacher: Tensor, backend: Backend) -> None:
    if backend == "reference":
        raise ValueError('inplace=True needs a fused backend: backend "reference" leaves the gradient to autograd')
    if logits.is_leaf or (not torch.compiler.is_compiling() and rows._base is not None and rows._base.is_leaf):
        raise ValueError(
            "inplace=True would write the gradient over student_logits that are a leaf, as a parameter is, or a view of"
            " one; it is for what a model computes"
        )
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"inplace=True needs rows of their own, got student_logits of strides {logits.stride()}")
    # a compiler copies what is read under two names
    if not torch.compiler.is_compiling() and rows.untyped_storage()._cdata == teacher.untyped_storage()._cdata:
        raise ValueError("inplace=True would write over teacher_logits, which share their memory with student_logits")


def _per_token(name: str, value: Tensor | float, N: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number or tensor as [1] or [N] on the device, without looking into it."""
    if not isinstance(value, Tensor):
        # not `full`, which torch.compile would compile again for each value
        return torch.ones(1, device=device, dtype=dtype) * value
    flat = value.detach().reshape(-1)
    if flat.numel() not in (1, N):
        raise ValueError(f"{name} must be one value or one a token ({N}), got shape {tuple(value.shape)}")
    return flat.to(device=device, dtype=dtype, non_blocking=True)


def _token_weights(weights: Tensor | None, N: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[N], or [1] of 1 where none are given."""
    return _per_token("token_weights", 1.0 if weights is None else weights, N, device, dtype)


def _divisor(reduction: Reduction, num_items: Tensor | float | None, num_tokens: Tensor) -> Tensor | float:
    """What the reduction divides each token's loss by."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    divisor: Tensor | float
    if num_items is None:
        divisor = num_tokens.clamp_min(1)
    elif isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
        divisor = num_items.detach().reshape(())
    else:
        if not 0 < num_items < math.inf:
            raise ValueError(f"num_items must be positive and finite, got {num_items}")
        divisor = num_items
    return divisor if reduction == "mean" else 1.0


def _transform(name: str, scale: float, softcap: float | None) -> tuple[float, float]:
    """(scale, softcap), softcap 0 for none."""
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}_scale must be positive and finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}_softcap must be positive and finite, or None; got {softcap}")
    return float(scale), float(softcap or 0.0)
