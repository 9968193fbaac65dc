"""The operator behind the fused linear loss: rows of hidden states go through both lm_heads chunk by chunk, each chunk's
logits through the row kernel, and on into the gradients. No more logits than a chunk's are ever in memory.

Autograd lives here. Checks nothing that `linear_loss.py` has checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_fast import ops
from pocl_fast.projection import Head, add_weight_grad_

# Two chunks of logits (student and teacher) at most, on a CPU: beyond 256 rows its products gain nothing
CPU_BUDGET = 128 << 20
CUDA_CHUNKS = (1024, 4096)  # fewer rows read the lm_head's gradient too often; more gain nothing


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


@torch.library.custom_op("pocl_fast::linear_distillation", mutates_args=())
def linear_distillation(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    teacher: list[Tensor],  # dense: logits; linear: hidden, weight, maybe bias; topk: log_probs, indices; none: nothing
    labels: Tensor,  # [N] int32 or int64
    temperature: Tensor,  # [1] or [N] fp32
    alpha: Tensor,  # [1] or [N] fp32
    row_scale: Tensor,  # [N] fp32: token weight over the divisor
    teacher_kind: str,
    tail: str,  # of a topk teacher
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    dtype: torch.dtype,  # of the products' inputs, for the student's
    chunk_tokens: int,  # 0: by the memory that is free
    max_supervised: int,  # rows that are multiplied on a GPU; 0: all
    per_token: bool,  # the loss of each token, and no gradient yet: backward is what knows each row's factor
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, [] or [N] fp32; the rows of `reference.Rows`, unscaled, [7, N] fp32; and the loss's gradients by hidden
    [N, H], weight [V, H] fp32 and bias [V] fp32, each empty unless it is needed (and where `per_token`)."""
    N, H = hidden.shape
    V = weight.shape[0]
    needs = Needs(*(need and not per_token for need in (needs_hidden, needs_weight, needs_bias)))
    stats = torch.zeros((ops.NUM_STATS, N), dtype=torch.float32, device=hidden.device)
    per_row = torch.zeros(N, dtype=torch.float32, device=hidden.device)
    grad_hidden = hidden.new_zeros((N, H) if needs.hidden else (0,))
    grad_weight = hidden.new_zeros((V, H) if needs.weight else (0,), dtype=torch.float32)
    grad_bias = hidden.new_zeros((V,) if needs.bias else (0,), dtype=torch.float32)
    rows, labels, row_scale = _supervised_rows(labels, row_scale, ignore_index, max_supervised, V)
    n = N if rows is None else len(rows)
    take = _taker(rows, N)

    head = Head(weight, bias, dtype)
    logits_of_teacher = _teacher_logits(teacher, teacher_kind, take)
    chunk = min(chunk_tokens or default_chunk(hidden.device, V, _teacher_width(teacher, teacher_kind)), max(n, 1))
    workspace = _Workspace(hidden.device, backend)
    for first in range(0, n, chunk):
        part = slice(first, min(first + chunk, n))
        size = part.stop - first
        chunk_hidden = take(hidden, part)
        logits = workspace.take("student", size, V)
        head.logits(chunk_hidden, logits)
        # a GPU multiplies gradients in the inputs' dtype; on a CPU they stay fp32, over the logits they came from
        grad = logits if not hidden.is_cuda or dtype == torch.float32 else workspace.take("grad", size, V, dtype)
        shared: dict[str, Any] = dict(
            divergence=divergence,
            teacher_share=teacher_share,
            temperature_power=temperature_power,
            ignore_index=ignore_index,
            needs_grad=any(needs),
            grad=grad if any(needs) else None,
        )
        values = (
            take(labels, part, chosen=True),
            *(take(v, part) if v.numel() > 1 else v for v in (temperature, alpha)),
            take(row_scale, part, chosen=True),
        )
        if teacher_kind == "topk":
            chunk_stats, _ = ops.backend_module(backend, "sparse").sparse_distillation_rows(
                logits, *(take(x, part) for x in teacher), *values, tail=tail, transform=transforms[:2], **shared
            )
        else:
            teacher_logits = logits if teacher_kind == "none" else logits_of_teacher(part, workspace)
            chunk_stats, _ = ops.backend_module(backend).distillation_rows(
                logits, teacher_logits, *values, transforms=transforms, **shared
            )
        chunk_loss = torch.where(values[0] == ignore_index, 0.0, chunk_stats[0] * values[3])
        _put(stats, chunk_stats, rows, part, 1)
        _put(per_row, chunk_loss, rows, part, 0)
        if needs.hidden:
            _put(grad_hidden, head.hidden_grad(grad).to(hidden.dtype), rows, part, 0)
        if needs.weight:
            add_weight_grad_(grad_weight, grad, chunk_hidden, dtype)
        if needs.bias:
            grad_bias += grad.sum(0, dtype=torch.float32)
    return per_row if per_token else per_row.sum(), stats, grad_hidden, grad_weight, grad_bias


@linear_distillation.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: list[Tensor],
    labels: Tensor,
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    teacher_kind: str,
    tail: str,
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    dtype: torch.dtype,
    chunk_tokens: int,
    max_supervised: int,
    per_token: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, H = hidden.shape
    V = weight.shape[0]

    def fp32(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    return (
        fp32(N) if per_token else fp32(),
        fp32(ops.NUM_STATS, N),
        hidden.new_empty((N, H) if needs_hidden and not per_token else (0,)),
        fp32(V, H) if needs_weight and not per_token else fp32(0),
        fp32(V) if needs_bias and not per_token else fp32(0),
    )


# ---- rows and memory ----


def _supervised_rows(
    labels: Tensor, row_scale: Tensor, ignore_index: int, max_supervised: int, V: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The rows to multiply (None: all, in place), their labels and scales. On a GPU nothing is counted, which would
    stop it: `max_supervised` rows are taken, the supervised first."""
    counted = labels != ignore_index
    if not labels.is_cuda:
        wrong = counted & ((labels < 0) | (labels >= V))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"label {int(labels[row])} at token {row} is outside the student's vocabulary of {V}")
        rows = counted.nonzero()[:, 0]
        if 0 < max_supervised < len(rows):
            raise ValueError(f"max_supervised is {max_supervised}, and {len(rows)} tokens are supervised")
    elif not max_supervised:
        return None, labels, row_scale
    else:
        # stable, so that each token's place, and with it every sum, is the same each time
        rows = torch.argsort((~counted).to(torch.int8), stable=True)[:max_supervised]
        too_many = counted.sum() > max_supervised
        row_scale = torch.where(too_many, float("nan"), row_scale)  # never silently dropped
    if len(rows) == len(labels):
        return None, labels, row_scale
    return rows, labels[rows], row_scale[rows]


def _taker(rows: Tensor | None, N: int) -> Callable[..., Tensor]:
    """A function of a tensor with a row a token: its rows of a chunk of the supervised ones. `chosen`: it holds these
    alone already."""

    def take(x: Tensor, part: slice, chosen: bool = False) -> Tensor:
        return x[part] if rows is None or chosen else x.index_select(0, rows[part])

    return take


def _put(out: Tensor, values: Tensor, rows: Tensor | None, part: slice, dim: int) -> None:
    if rows is None:
        out.narrow(dim, part.start, part.stop - part.start).copy_(values)
    else:
        out.index_copy_(dim, rows[part], values)


def default_chunk(device: torch.device, V: int, V_teacher: int) -> int:
    """Rows whose logits are in memory at a time, by the memory that is free."""
    row = 4 * (V + V_teacher)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        least, most = CUDA_CHUNKS
        return max(least, min(most, free // 4 // row // 128 * 128))
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(32, min(1024, min(CPU_BUDGET, available // 4) // row // 32 * 32))


class _Workspace:
    """Matrices that are taken anew for each chunk, out of the same memory."""

    def __init__(self, device: torch.device, backend: str) -> None:
        self.device, self.backend = device, backend
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        held = self._held.get(name)
        if held is None or len(held) < rows:
            self._held[name] = held = torch.empty((rows, columns), dtype=dtype, device=self.device)
        return held[:rows]


def _teacher_width(teacher: list[Tensor], kind: str) -> int:
    """Columns of the teacher's logits that have to be made for each chunk."""
    return teacher[1].shape[0] if kind == "linear" else 0


def _teacher_logits(teacher: list[Tensor], kind: str, take: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a chunk: the teacher's logits of it."""
    if kind == "linear":
        hidden, weight = teacher[:2]
        head = Head(weight, teacher[2] if len(teacher) > 2 else None, hidden.dtype)

        def project(part: slice, workspace: _Workspace) -> Tensor:
            out = workspace.take("teacher", part.stop - part.start, weight.shape[0])
            head.logits(take(hidden, part), out)
            return out

        return project
    return lambda part, workspace: take(teacher[0], part)


# ---- autograd ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    hidden, weight, bias, teacher = inputs[:4]
    ctx.per_token, ctx.backend = inputs[18], inputs[22]
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.num_teacher = len(teacher)
    if ctx.per_token:
        ctx.options = inputs[8:18], inputs[19:]
        ctx.save_for_backward(hidden, weight, bias, *teacher, *inputs[4:8])
    else:
        ctx.grads = output[2:]  # not save_for_backward: handed over for good, see ops.py


def _backward(ctx: Any, upstream: Tensor | None, *_others: None) -> tuple[Any, ...]:
    nothing = [None] * ctx.num_teacher, *(None,) * 19
    if upstream is None:
        return None, None, None, *nothing
    if torch.is_grad_enabled() and type(upstream) is Tensor:
        raise RuntimeError(ops.ONCE)
    if ctx.per_token:
        grads, upstream = _recomputed(ctx, upstream), None
    else:
        if ctx.grads is None:
            raise RuntimeError(ops.SECOND_BACKWARD)
        grads = ctx.grads
    keep = type(upstream) is Tensor and ops.graph_is_kept()
    out = tuple(
        _finished(grad, upstream, dtype, keep, ctx.backend) if needed and grad.numel() else None
        for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
    )
    if not ctx.per_token and type(upstream) is Tensor and not keep:
        ctx.grads = None
    return *out, *nothing


def _recomputed(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    hidden, weight, bias, *rest = ctx.saved_tensors
    teacher, (labels, temperature, alpha, row_scale) = rest[: ctx.num_teacher], rest[ctx.num_teacher :]
    before, after = ctx.options
    _loss, _stats, *grads = linear_distillation(
        hidden, weight, bias, teacher, labels, temperature, alpha, row_scale * upstream, *before, False, *after
    )
    return tuple(grads)


def _finished(grad: Tensor, upstream: Tensor | None, dtype: torch.dtype, keep: bool, backend: str) -> Tensor:
    """The gradient times the loss's own, in the dtype of what it is the gradient of."""
    if upstream is None:
        return grad.to(dtype)
    if grad.dtype != dtype or grad.dim() == 1 or type(upstream) is not Tensor:  # the conversion has to read all of it
        return _converted(grad, upstream, dtype)
    grad = grad.clone() if keep else grad
    ops.scale_rows(grad, upstream.reshape(1).expand(len(grad)).contiguous(), backend)
    return grad


def _converted(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    if grad.is_cuda or type(upstream) is not Tensor or grad.dtype == dtype:
        return (grad * upstream).to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    for first in range(0, len(grad), 4096):  # a CPU would hold all of the product in fp32 once more
        torch.mul(grad[first : first + 4096], upstream, out=out[first : first + 4096])
    return out


linear_distillation.register_autograd(_backward, setup_context=_setup_context)
