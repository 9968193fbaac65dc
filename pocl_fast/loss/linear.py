"""The fused loss of hidden states and an lm_head: `linear_distillation_loss`, whose logits are never all in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pocl_fast.loss import linear_operator, reference
from pocl_fast.loss.arguments import IDENTITY
from pocl_fast.loss.checks import (
    Backend,
    Reduction,
    check_differentiation,
    check_head_inputs,
    check_labels_of_hidden,
    check_positive,
    check_shards,
    check_teacher_row,
    choose_backend,
    transform,
)
from pocl_fast.loss.kinds import check_tensor
from pocl_fast.loss.objective import Objective, check_objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.loss.prepared import Prepared, Weighing, prepare
from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher, TeacherOutput, TopKTeacher

if TYPE_CHECKING:
    from pocl_fast.loss.vocabulary_shards import VocabularyShards

Weight: TypeAlias = Tensor | Callable[[], Tensor]


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Weight,
    teacher: TeacherOutput | None,
    labels: Tensor,
    objective: Objective,
    *,
    student_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: Tensor | float | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
    max_supervised: int | None = None,
    vocabulary_shards: VocabularyShards | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """`distillation_loss` of logits that are never all in memory: only supervised tokens meet the lm_heads, a chunk at
    a time, and the gradients of hidden states, weight and bias are computed in the same pass.

    Args:
        student_hidden: [N, H] or [B, T, H], after the final norm; fp32, bf16 or fp16 (float64 by the reference alone).
        student_weight: [V, H], the lm_head's, of the hidden states' dtype but under autocast; or a function that gives
            it (an lm_head with LoRA: `lambda: W + scale * B @ A`), differentiated through. A DTensor, as FSDP makes,
            is gathered and its gradient averaged over the ranks; under DeepSpeed ZeRO-3 call the loss within the
            engine's forward, or loss and backward in `deepspeed.zero.GatheredParameters`. Without `requires_grad` its
            part of the work is left out.
        teacher: `DenseTeacher`, `LinearTeacher` or `TopKTeacher`, of the same tokens; never differentiated. None for
            cross-entropy alone, with an objective whose alpha is 1.
        labels, objective, token_weights, num_items, reduction, ignore_index, logit_scale, logit_softcap, backend: as in
            `distillation_loss`. With reduction "none" backward computes the gradient, by doing the work again.
        chunk_tokens: tokens whose logits are in memory at a time; None chooses by the memory that is free.
        max_supervised: on a GPU, the most tokens that are supervised: so many rows are multiplied. Counting them there
            would stop the GPU, so None multiplies all N. A batch that holds more has a NaN loss. A CPU counts.
        vocabulary_shards: the ranks over which tensor parallelism has cut the lm_heads along the vocabulary; see
            `VocabularyShards`.

    A logit of −inf, by a bias or in a `DenseTeacher`, is probability 0 as in `distillation_loss`. The logits reach the
    softmax in fp32, unrounded, and the weight's gradient is summed in fp32. Nothing synchronises
    with a GPU. The gradient is not itself differentiable, and torch.func does not go through (backend "reference" is,
    and does, and holds all logits).

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for a label outside the vocabulary.
    (arXiv 2506.05695, equation 4.)
    """
    check_objective(objective)
    work = _Work(chunk_tokens, max_supervised, vocabulary_shards, backend)
    heads = _heads(student_hidden, student_weight, student_bias, labels, work)
    compared = _teacher(teacher, student_hidden, objective, transform("logit", logit_scale, logit_softcap))
    return _loss(heads, compared, objective, Weighing(token_weights, num_items, reduction, ignore_index), work)


class _Work(NamedTuple):
    """Options of the linear loss alone."""

    chunk_tokens: int | None
    max_supervised: int | None
    shards: VocabularyShards | None
    backend: Backend


class _Heads(NamedTuple):
    """The student's side."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]
    dtype: torch.dtype  # that the products' inputs are rounded to


class _Compared(NamedTuple):
    """The teacher's side, and both sides' transforms."""

    given: TeacherOutput | None
    kind: str  # of linear_operator.linear_distillation
    tensors: list[Tensor]  # those with a row a token are [N, ...]; detached
    transforms: list[float]
    tail: str


def _heads(hidden: Tensor, weight: Weight, bias: Tensor | None, labels: Tensor, work: _Work) -> _Heads:
    whole = full_weight if work.shards is None else local
    check_tensor("student_hidden", hidden)
    name = "student_weight"
    if callable(weight) and not isinstance(weight, (Tensor, torch.nn.Module)):
        name, weight = "what student_weight gives", weight()
    check_tensor(name, weight)
    assert isinstance(weight, Tensor)
    if bias is not None:
        check_tensor("student_bias", bias)
    weight = whole(weight)
    bias = None if bias is None else whole(bias)
    dtype = _product_dtype(hidden, weight)
    check_head_inputs("student", hidden, weight, bias)
    check_labels_of_hidden(hidden, labels)
    check_positive(chunk_tokens=work.chunk_tokens, max_supervised=work.max_supervised)
    return _Heads(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), dtype)


def _teacher(
    teacher: TeacherOutput | None, student_hidden: Tensor, objective: Objective, own: tuple[float, float]
) -> _Compared:
    """`own` is the student's transform: without a teacher it is compared with itself, so that D is 0."""
    rest: list[Tensor] = []
    if teacher is None:
        if isinstance(objective.alpha, Tensor) or objective.alpha != 1:
            raise ValueError(f"without a teacher the objective's alpha must be 1, got {objective.alpha}")
        return _Compared(None, "none", [], [*own, *own], "bucket")
    if isinstance(teacher, DenseTeacher):
        kind, rows = "dense", [("teacher.logits", teacher.logits)]
    elif isinstance(teacher, LinearTeacher):
        check_head_inputs("teacher", teacher.hidden, teacher.weight, teacher.bias)
        if teacher.hidden.dtype != teacher.weight.dtype:
            raise ValueError(
                f"teacher.hidden is {teacher.hidden.dtype} and teacher.weight {teacher.weight.dtype}; convert one"
            )
        kind, rows = "linear", [("teacher.hidden", teacher.hidden)]
        rest = [teacher.weight] if teacher.bias is None else [teacher.weight, teacher.bias]
    elif isinstance(teacher, TopKTeacher):
        teacher.check()
        kind, rows = "topk", [("teacher.log_probs", teacher.log_probs), ("teacher.indices", teacher.indices)]
    else:
        raise TypeError(
            "teacher must be a DenseTeacher, LinearTeacher, TopKTeacher or None (cross-entropy alone);"
            f" got {type(teacher).__name__}"
        )
    for name, x in rows:
        check_teacher_row(name, x, student_hidden)
    tensors = [x.detach() for x in (*(x.reshape(-1, x.shape[-1]) for _, x in rows), *rest)]
    if isinstance(teacher, TopKTeacher):
        return _Compared(teacher, kind, tensors, [*own, *IDENTITY], teacher.tail)
    transforms = [*own, *transform("teacher.logit", teacher.logit_scale, teacher.logit_softcap)]
    return _Compared(teacher, kind, tensors, transforms, "bucket")


def _loss(heads: _Heads, teacher: _Compared, objective: Objective, weighing: Weighing, work: _Work) -> LossOutput:
    hidden, weight, bias, labels, dtype = heads
    if work.shards is not None:
        check_shards(work.shards, work.backend, weight, teacher.given)
    backend = choose_backend(work.backend, hidden, teacher.tensors[0] if teacher.tensors else hidden)
    check_differentiation(backend, hidden, weight)
    ready = prepare(
        labels,
        objective,
        weighing,
        transforms=teacher.transforms,
        tail=teacher.tail,
        top_k=teacher.given if isinstance(teacher.given, TopKTeacher) else None,
        V=weight.shape[0],
        dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
        half=torch.float16 in (dtype, hidden.dtype),
        backend=backend,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            sides = hidden.to(dtype), weight.to(dtype), bias, teacher.tensors, teacher.kind
            return ready.reference_output(reference.linear_distillation_rows(*sides, ready.tokens, ready.settings))
        return ready.output(*_fused(heads, teacher, ready, work, backend))


def _fused(heads: _Heads, teacher: _Compared, ready: Prepared, work: _Work, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and stats by the operator."""
    hidden, weight, bias, labels, dtype = heads
    tokens = ready.tokens._replace(row_scale=ready.tokens.row_scale.expand(len(labels)).contiguous())
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    group, rows = "", [weight.shape[0]]
    if work.shards is not None:
        group, rows = work.shards.group.group_name, list(work.shards.student)
    loss, stats, *_ = linear_operator.linear_distillation(
        hidden,
        weight,
        bias,
        teacher.tensors,
        teacher.kind,
        *tokens,
        *ready.settings,
        dtype,
        work.chunk_tokens or 0,
        work.max_supervised or 0,
        not ready.reduced,
        needs,
        backend,
        group,
        rows,
    )
    return loss, stats


def full_weight(weight: Tensor) -> Tensor:
    """A weight that FSDP has sharded, whole; its gradient goes back to the shards averaged over the ranks, as FSDP
    averages every other. Raises ValueError for one that DeepSpeed has sharded, which only DeepSpeed gathers."""
    if getattr(weight, "ds_id", None) is not None and weight.numel() == 0:
        raise ValueError(
            "student_weight or student_bias is partitioned by DeepSpeed ZeRO-3: call the loss within the forward of the"
            " engine's module, or call the loss and backward within deepspeed.zero.GatheredParameters([...])"
        )
    if type(weight) in (Tensor, torch.nn.Parameter):  # no import of torch.distributed for nothing
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that tensor parallelism has cut; its gradient stays with the part."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products' inputs are rounded to: their own dtype, or autocast's."""
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"student_hidden and student_weight must be floating-point, got {hidden.dtype}, {weight.dtype}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"student_hidden is {hidden.dtype} and student_weight {weight.dtype}; convert one, or use torch.autocast"
        )
    return hidden.dtype
