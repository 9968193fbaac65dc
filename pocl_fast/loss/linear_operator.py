"""The operator behind the fused linear loss: hidden states go through both lm_heads chunk by chunk, each chunk's logits
through the row kernel, and on into the gradients. No more logits than a chunk's are ever in memory.

Autograd lives here. Checks nothing that `linear_loss.py` has checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pocl_fast.loss import row_operator
from pocl_fast.loss.lm_head_products import Head, on_cpu, weight_grad_

if TYPE_CHECKING:
    from pocl_fast.loss.vocabulary_shards import Shard

CPU_BUDGET = 48 << 20  # chunks of logits (student's and teacher's), unless that is less than the least rows
CPU_CHUNKS = (256, 1024)  # as below; 96 rows of a vocabulary of 152k took 1.4 times as long as 256
CUDA_CHUNKS = (1024, 4096)  # fewer rows read the lm_head's gradient too often; more gain nothing


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
    vocabulary_group: str,  # the ranks that weight, bias and the teacher's vocabulary are cut over; "": none
    vocabulary_rows: list[int],  # of the weight, on each of these ranks
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, [] or [N] fp32; the rows of `reference.Rows`, unscaled, [7, N] fp32; and the loss's gradients by hidden
    [N, H], weight [V, H] fp32 and bias [V] fp32, each empty unless it is needed (and where `per_token`)."""
    V = weight.shape[0]
    needs = Needs(*(need and not per_token for need in (needs_hidden, needs_weight, needs_bias)))
    shard = _shard(vocabulary_group, vocabulary_rows) if vocabulary_group else None
    out = _Outputs(hidden, V, needs, shard is not None, _large)
    rows = _Rows(labels, row_scale, ignore_index, max_supervised, shard.V if shard else V)
    head = Head(weight, bias, dtype)
    workspace = _Workspace(hidden.device)
    row_kernel = _row_kernel(
        backend,
        shard,
        _TeacherRows(teacher, teacher_kind, tail, rows, workspace),
        transforms,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        needs_grad=any(needs),
    )
    teacher_columns = teacher[1].shape[0] if teacher_kind == "linear" else 0
    own_chunk = shard.chunk(hidden.device) if shard else default_chunk(hidden.device, V, teacher_columns)
    chunk = chunk_tokens or own_chunk
    for first in range(0, rows.count, chunk):
        part = slice(first, min(first + chunk, rows.count))
        chunk_hidden = rows.take(hidden, part)
        logits = workspace.take("student", len(chunk_hidden), V)
        head.logits(chunk_hidden, logits)
        # a GPU multiplies gradients in the inputs' dtype; on a CPU they stay fp32, over the logits they came from
        apart = not on_cpu(hidden) and dtype != torch.float32 and any(needs)
        grad = workspace.take("grad", len(logits), V, dtype) if apart else logits
        chunk_values = tuple(rows.take(value, part) if value.numel() > 1 else value for value in (temperature, alpha))
        chunk_labels, chunk_scale = rows.labels[part], rows.row_scale[part]
        loss, stats = row_kernel(part, logits, chunk_labels, *chunk_values, chunk_scale, grad if any(needs) else None)
        rows.put(out.stats, stats, part, dim=1)
        rows.put(out.loss, loss, part)
        if needs.hidden:
            rows.put(out.grad_hidden, head.hidden_grad(grad, out.grad_hidden.dtype), part)
        if needs.weight:
            weight_grad_(out.grad_weight, grad, chunk_hidden, dtype, add=first > 0)
        if needs.bias:
            out.grad_bias += grad.sum(0, dtype=torch.float32)
    if rows.count == 0:
        out.grad_weight.zero_()
    if shard and needs.hidden:
        shard.add_up_(out.grad_hidden)
    return out.loss if per_token else out.loss.sum(), out.stats, out.grad_hidden, out.grad_weight, out.grad_bias


@linear_distillation.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_token, *needs, _backend, vocabulary_group, _rows = others[-7:]
    out = _Outputs(
        hidden, weight.shape[0], Needs(*(need and not per_token for need in needs)), bool(vocabulary_group), torch.empty
    )
    return out.loss if per_token else out.loss.sum(), out.stats, out.grad_hidden, out.grad_weight, out.grad_bias


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class _Outputs:
    """What the operator returns, 0 as long as no chunk was added; the weight's gradient is not yet written."""

    def __init__(self, hidden: Tensor, V: int, needs: Needs, sharded: bool, empty: Callable[..., Tensor]) -> None:
        N, H = hidden.shape
        self.loss = _zeros(hidden, N)
        self.stats = _zeros(hidden, row_operator.NUM_STATS, N)
        # a part of a sum over the ranks is not rounded
        self.grad_hidden = hidden.new_zeros(
            (N, H) if needs.hidden else (0,), dtype=torch.float32 if sharded else hidden.dtype
        )
        shape = (V, H) if needs.weight else (0, 0)
        self.grad_weight = empty(*shape, dtype=torch.float32, device=hidden.device)
        self.grad_bias = _zeros(hidden, V if needs.bias else 0)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def _large(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix; on a CPU from memory that is kept for the next loss, as fresh pages cost dearly."""
    if device.type == "cpu":
        return row_operator.backend_module("cpp").empty_rows(rows, columns, dtype)
    return torch.empty((rows, columns), dtype=dtype, device=device)


def _shard(group_name: str, rows: list[int]) -> Shard:
    from pocl_fast.loss.vocabulary_shards import Shard  # not every torch has torch.distributed

    return Shard(group_name, rows)


# ---- rows and memory ----


class _Rows:
    """The rows that are multiplied: the supervised ones, with their labels and scales.

    On a GPU nothing is counted, which would stop it: `max_supervised` rows are taken, the supervised first, or all."""

    def __init__(self, labels: Tensor, row_scale: Tensor, ignore_index: int, max_supervised: int, V: int) -> None:
        counted = labels != ignore_index
        self.index: Tensor | None = None  # None: all, where they lie
        if on_cpu(labels):
            row_operator.check_labels(labels, counted, V)
            self.index = counted.nonzero()[:, 0]
            if 0 < max_supervised < len(self.index):
                raise ValueError(f"max_supervised is {max_supervised}, and {len(self.index)} tokens are supervised")
        elif max_supervised:
            # stable, so that each token's place, and with it every sum, is the same each time
            self.index = torch.argsort((~counted).to(torch.int8), stable=True)[:max_supervised]
            too_many = counted.sum() > max_supervised
            row_scale = torch.where(too_many, float("nan"), row_scale)  # never silently dropped
        if self.index is not None and len(self.index) == len(labels):
            self.index = None
        self.labels = labels if self.index is None else labels[self.index]
        self.row_scale = row_scale if self.index is None else row_scale[self.index]
        self.count = len(self.labels)

    def take(self, x: Tensor, part: slice) -> Tensor:
        """Of a tensor with a row a token, a chunk of these rows."""
        return x[part] if self.index is None else x.index_select(0, self.index[part])

    def put(self, out: Tensor, values: Tensor, part: slice, dim: int = 0) -> None:
        """The opposite: the chunk's values to their tokens' places."""
        if self.index is None:
            out.narrow(dim, part.start, part.stop - part.start).copy_(values)
        else:
            out.index_copy_(dim, self.index[part], values)


def default_chunk(device: torch.device, V: int, teacher_columns: int) -> int:
    """Rows whose logits are in memory at a time, by the memory that is free."""
    row_bytes = 4 * (V + teacher_columns)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        least, most = CUDA_CHUNKS
        return max(least, min(most, free // 4 // row_bytes // 128 * 128))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    least, most = CPU_CHUNKS
    return max(32, min(most, max(least, CPU_BUDGET // row_bytes), free // 4 // row_bytes) // 32 * 32)


class _Workspace:
    """Matrices that are taken anew for each chunk, out of the same memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        held = self._held.get(name)
        if held is None or len(held) < rows:
            # whole vectors, and no power of 2 apart: columns of such rows would share few places in the caches
            stride = columns if self.device.type != "cpu" else (columns + 15) // 16 * 16 + 16 * (columns % 1024 == 0)
            self._held[name] = held = _large(rows, stride, dtype=dtype, device=self.device)[:, :columns]
        return held[:rows]


# ---- the row kernels ----


class _TeacherRows:
    """A teacher's rows of a chunk: dense logits, made here where the teacher is linear, or its k best."""

    def __init__(self, tensors: list[Tensor], kind: str, tail: str, rows: _Rows, workspace: _Workspace) -> None:
        self.tensors, self.kind, self.tail, self.rows, self.workspace = tensors, kind, tail, rows, workspace
        if kind == "linear":
            hidden, weight = tensors[:2]
            self.head = Head(weight, tensors[2] if len(tensors) > 2 else None, hidden.dtype)

    def logits(self, part: slice, student: Tensor) -> Tensor:
        if self.kind == "none":
            return student  # D is 0 then, and its row is in the cache
        rows = self.rows.take(self.tensors[0], part)
        if self.kind == "dense":
            return rows
        out = self.workspace.take("teacher", len(rows), self.head.weight.shape[0])
        self.head.logits(rows, out)
        return out


def _row_kernel(
    backend: str, shard: Shard | None, teacher: _TeacherRows, transforms: list[float], **options: Any
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of a chunk, its student logits [n, V], labels, temperature, alpha, row_scale, and of the gradient's
    place: the scaled losses [n] and the stats [7, n]."""
    if teacher.kind == "topk":
        sparse = row_operator.backend_module(backend, "sparse").sparse_distillation_rows

        def topk(part: slice, logits: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
            log_probs, indices = (teacher.rows.take(x, part) for x in teacher.tensors)
            return sparse(
                logits, log_probs, indices, *values[:-1],
                tail=teacher.tail, transform=transforms[:2], grad=values[-1], reduced=False, **options,
            )[:2]  # fmt: skip

        return topk
    dense = shard.distillation_rows if shard else row_operator.backend_module(backend).distillation_rows

    def rows(part: slice, logits: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return dense(
            logits, teacher.logits(part, logits), *values[:-1],
            transforms=transforms, grad=values[-1], reduced=False, **options,
        )[:2]  # fmt: skip

    return rows


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
    nothing = [None] * ctx.num_teacher, *(None,) * 21
    if upstream is None:
        return None, None, None, *nothing
    if torch.is_grad_enabled() and type(upstream) is Tensor:
        raise RuntimeError(row_operator.ONCE)
    if ctx.per_token:
        grads, upstream = _recomputed(ctx, upstream), None
    else:
        if ctx.grads is None:
            raise RuntimeError(row_operator.SECOND_BACKWARD)
        grads = ctx.grads
    keep = type(upstream) is Tensor and row_operator.graph_is_kept()
    out = tuple(
        _finished(grad, upstream, dtype, keep, ctx.backend) if needed else None
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
    row_operator.scale_rows(grad, upstream.reshape(1), backend)
    return grad


def _converted(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    if not on_cpu(grad) or type(upstream) is not Tensor or grad.dtype == dtype:
        return (grad * upstream).to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    for first in range(0, len(grad), 4096):  # a CPU would hold all of the product in fp32 once more
        torch.mul(grad[first : first + 4096], upstream, out=out[first : first + 4096])
    return out


linear_distillation.register_autograd(_backward, setup_context=_setup_context)
