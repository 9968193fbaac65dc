"""The fused linear loss: hidden states and lm_head in, losses out, with every check of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pocl_fast.loss import linear_operator, reference, row_operator
from pocl_fast.loss.dense import (
    Backend,
    LossOutput,
    Reduction,
    _check_differentiation,
    _choose_backend,
    _divisor,
    _per_token,
    _token_weights,
    _transform,
)
from pocl_fast.loss.objective import Objective
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
    """`distillation_loss` of logits that never are in memory: only supervised tokens meet the lm_heads, a chunk at a
    time, and the gradients of hidden states, weight and bias are computed in the same pass.

    Args:
        student_hidden: [N, H] or [B, T, H], after the final norm; fp32, bf16 or fp16 (float64 by the reference alone).
        student_weight: [V, H], the lm_head's, of the hidden states' dtype but under autocast; or a function that gives
            it (an lm_head with LoRA: `lambda: W + scale * B @ A`), differentiated through. A DTensor, as FSDP makes,
            is gathered and its gradient averaged over the ranks; DeepSpeed ZeRO-3 gathers its own within the forward
            of the engine's module, or in `deepspeed.zero.GatheredParameters` around loss and backward. What does not
            require a gradient skips its part of the work.
        teacher: `DenseTeacher`, `LinearTeacher` or `TopKTeacher`, of the same tokens; never differentiated. None for
            cross-entropy alone, with an objective whose alpha is 1.
        labels, objective, token_weights, num_items, ignore_index, logit_scale, logit_softcap: as in
            `distillation_loss`.
        reduction: as in `distillation_loss`. With "none" the gradient is computed in backward, by doing the work again.
        chunk_tokens: tokens whose logits are in memory at a time; None chooses by the memory that is free.
        max_supervised: on a GPU, the most tokens that are supervised: so many rows are multiplied. Counting them there
            would stop the GPU, so None multiplies all N. A batch that holds more has a NaN loss. A CPU counts.
        vocabulary_shards: the ranks over which the lm_heads are cut along the vocabulary, as tensor parallelism cuts
            them. Weights, biases and a `DenseTeacher`'s logits are this rank's parts, a DTensor's local ones; hidden
            states, labels (ids of the whole vocabulary) and all else are the same on every rank, and so are the
            results and the hidden states' gradient. The weight's and bias's are this rank's own. Every rank calls, and
            of a loss a token every rank calls backward. Its logits go through torch, not a kernel: thirteen matrices of
            a chunk's part are in memory.
        backend: "auto" takes Triton on CUDA and ROCm, C++ on a CPU, the reference for float64.

    The logits reach the softmax in fp32, unrounded, and the weight's gradient is summed in fp32. Nothing synchronises
    with a GPU. The gradient is not itself differentiable, and torch.func does not go through (backend "reference" is,
    and does, and holds all logits).

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for a label outside the vocabulary.
    (arXiv 2506.05695, equation 4.)
    """
    whole = gathered if vocabulary_shards is None else local
    weight = whole(student_weight() if callable(student_weight) else student_weight)
    bias = None if student_bias is None else whole(student_bias)
    dtype = _product_dtype("student_hidden", student_hidden, "student_weight", weight)
    _check_head("student", student_hidden, weight, bias)
    tokens = student_hidden.shape[:-1]
    _check_tokens(tokens, labels, student_hidden.device)
    kind, tensors, teacher_transform = _unpacked(teacher, tokens, student_hidden.device, objective)
    if vocabulary_shards is not None:
        _check_shards(vocabulary_shards, backend, weight, teacher)
    backend = _choose_backend(backend, student_hidden, tensors[0] if tensors else student_hidden)
    if backend != "reference":
        _check_differentiation(student_hidden, weight)
    hidden, labels = student_hidden.reshape(-1, student_hidden.shape[-1]), labels.reshape(-1)
    N = labels.numel()
    fp = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = labels != ignore_index
    num_tokens = counted.sum()
    weights = _token_weights(token_weights, N, hidden.device, fp).expand(N)
    divisor = _divisor(reduction, num_items, num_tokens)
    for name, value in (("chunk_tokens", chunk_tokens), ("max_supervised", max_supervised)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None; got {value}")
    temperature = _per_token("temperature", objective.temperature, N, hidden.device, fp)
    alpha = _per_token("alpha", objective.alpha, N, hidden.device, fp)
    transform = _transform("logit", logit_scale, logit_softcap)
    tail = teacher.tail if isinstance(teacher, TopKTeacher) else "bucket"
    if teacher is None:  # the student is compared with itself, so that D is 0
        teacher_transform = transform

    if backend == "reference":
        if labels.device.type == "cpu":
            row_operator.check_labels(labels, counted, weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            rows = reference.linear_distillation_rows(
                hidden.to(dtype),
                weight.to(dtype),
                bias,
                [x.detach() for x in tensors],
                labels,
                temperature,
                alpha,
                teacher_kind=kind,
                tail=tail,
                divergence=objective.family,
                teacher_share=objective.teacher_share,
                temperature_power=objective.temperature_power,
                ignore_index=ignore_index,
                student_transform=transform,
                teacher_transform=teacher_transform,
            )
        per_row = rows.loss * torch.where(counted, weights / divisor, 0.0)
        loss = per_row if reduction == "none" else per_row.sum()
        return LossOutput(loss, num_tokens, torch.stack([value.detach() for value in rows]))

    with_grad = torch.is_grad_enabled()
    # of a mean most of fp16's gradient would be below its smallest number before a GradScaler has made it larger
    late = torch.float16 in (dtype, hidden.dtype)
    scale = weights if late else weights / divisor
    with torch.autocast(hidden.device.type, enabled=False):
        loss, stats, *_ = linear_operator.linear_distillation(
            hidden,
            weight,
            bias,
            [x.detach() for x in tensors],
            labels,
            temperature,
            alpha,
            scale.float().contiguous(),
            kind,
            tail,
            objective.family,
            objective.teacher_share,
            objective.temperature_power,
            ignore_index,
            [*transform, *teacher_transform],
            dtype,
            chunk_tokens or 0,
            max_supervised or 0,
            reduction == "none",
            with_grad and hidden.requires_grad,
            with_grad and weight.requires_grad,
            with_grad and bias is not None and bias.requires_grad,
            backend,
            "" if vocabulary_shards is None else vocabulary_shards.group.group_name,
            [weight.shape[0]] if vocabulary_shards is None else list(vocabulary_shards.student),
        )
    if late:
        loss = loss / divisor
    return LossOutput(loss, num_tokens, stats.detach())


def gathered(weight: Tensor) -> Tensor:
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


def _product_dtype(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> torch.dtype:
    """What the products' inputs are rounded to: their own dtype, or autocast's."""
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"{hidden_name} and {weight_name} must be floating-point, got {hidden.dtype}, {weight.dtype}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{hidden_name} is {hidden.dtype} and {weight_name} {weight.dtype}; convert one, or use torch.autocast"
        )
    return hidden.dtype


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{side}_hidden must be [N, H] or [B, T, H], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{side}_weight must be [V, {hidden.shape[-1]}] for {side}_hidden of size {hidden.shape[-1]};"
            f" got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, x in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{side}_hidden is on {hidden.device} and {name} on {x.device}; move them to one")


def _check_shards(shards: VocabularyShards, backend: Backend, weight: Tensor, teacher: TeacherOutput | None) -> None:
    if isinstance(teacher, TopKTeacher):
        raise ValueError("vocabulary_shards takes a DenseTeacher or a LinearTeacher, got a TopKTeacher")
    if backend != "auto" or weight.dtype == torch.float64:
        raise ValueError(
            'vocabulary_shards needs backend "auto" and fp32, bf16 or fp16 tensors;'
            f" got backend {backend!r} and {weight.dtype}"
        )
    entries = None
    if teacher is not None:
        entries = teacher.logits.shape[-1] if isinstance(teacher, DenseTeacher) else len(teacher.weight)
    shards.check(len(weight), entries)


def _check_tokens(tokens: torch.Size, labels: Tensor, device: torch.device) -> None:
    if labels.shape != tokens:
        raise ValueError(f"labels must be {tuple(tokens)}, one a row of student_hidden; got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be int32 or int64, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"student_hidden is on {device} and labels on {labels.device}; move them to one")


def _unpacked(
    teacher: TeacherOutput | None, tokens: torch.Size, device: torch.device, objective: Objective
) -> tuple[str, list[Tensor], tuple[float, float]]:
    """The teacher's kind, tensors with a row a token, and transform."""
    if teacher is None:
        if isinstance(objective.alpha, Tensor) or objective.alpha != 1:
            raise ValueError(f"without a teacher the objective's alpha must be 1, got {objective.alpha}")
        return "none", [], (1.0, 0.0)
    if isinstance(teacher, DenseTeacher):
        kind, rows, rest = "dense", [("teacher.logits", teacher.logits)], []
    elif isinstance(teacher, LinearTeacher):
        _check_head("teacher", teacher.hidden, teacher.weight, teacher.bias)
        if teacher.hidden.dtype != teacher.weight.dtype:
            raise ValueError(
                f"teacher.hidden is {teacher.hidden.dtype} and teacher.weight {teacher.weight.dtype}; convert one"
            )
        kind, rows = "linear", [("teacher.hidden", teacher.hidden)]
        rest = [teacher.weight] if teacher.bias is None else [teacher.weight, teacher.bias]
    elif isinstance(teacher, TopKTeacher):
        teacher.check()
        kind, rest = "topk", []
        rows = [("teacher.log_probs", teacher.log_probs), ("teacher.indices", teacher.indices)]
    else:
        raise TypeError(
            "teacher must be a DenseTeacher, LinearTeacher, TopKTeacher or None (cross-entropy alone);"
            f" got {type(teacher).__name__}"
        )
    for name, x in rows:
        if x.shape[:-1] != tokens or x.shape[-1] == 0:
            raise ValueError(
                f"{name} must be {[*tokens, '...']}, one row a token of student_hidden; got {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"student_hidden is on {device} and {name} on {x.device}; move them to one")
    transform = (1.0, 0.0)
    if not isinstance(teacher, TopKTeacher):
        transform = _transform("teacher.logit", teacher.logit_scale, teacher.logit_softcap)
    return kind, [x.reshape(-1, x.shape[-1]) for _, x in rows] + rest, transform
