"""The operator behind the fused linear loss: hidden states go through both lm_heads chunk by chunk, each chunk's logits
through the row kernel, and on into the gradients. No more logits than a chunk's are ever in memory.

Autograd lives here. Nothing is checked that `checks.py` has checked.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pocl_fast.loss import row_operator
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.checks import check_labels_within
from pocl_fast.loss.lm_head_products import HeadProducts, on_cpu, weight_grad_

if TYPE_CHECKING:
    from pocl_fast.loss.vocabulary_shards import VocabularyShard

CPU_BUDGET = 48 << 20  # chunks of logits (student's and teacher's), unless that is less than the least rows
CPU_CHUNKS = (256, 1024)  # as below; 96 rows of a vocabulary of 152k took 1.4 times as long as 256
CUDA_CHUNKS = (1024, 4096)  # fewer rows read the lm_head's gradient too often; more gain nothing
TENSORS = ("hidden", "weight", "bias", "teacher", *Tokens._fields)  # arguments that are tensors


def _linear_distillation(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    teacher: list[Tensor],  # dense: logits; linear: hidden, weight, maybe bias; topk: log_probs, indices; none: nothing
    teacher_kind: str,
    labels: Tensor,  # from here on the fields of Tokens; each row has its own row_scale, [N]
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,  # from here on the fields of Settings
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    tail: str,
    dtype: torch.dtype,  # of the products' inputs, for the student's
    chunk_tokens: int,  # 0: by the memory that is free
    max_supervised: int,  # rows that are multiplied on a GPU; 0: all
    per_token: bool,  # the loss of each token, and no gradient yet: backward is what knows each row's factor
    needs: list[bool],  # whether gradients of hidden, weight and bias are wanted
    backend: str,
    vocabulary_group: str,  # the ranks that weight, bias and the teacher's vocabulary are cut over; "": none
    vocabulary_rows: list[int],  # of the weight, on each of these ranks
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, [] or [N] fp32; the rows of `reference.Rows`, unscaled, [7, N] fp32; and the loss's gradients by hidden
    [N, H], weight [V, H] fp32 and bias [V] fp32, each empty unless it is needed (and where `per_token`)."""
    V = weight.shape[0]
    wanted = Needs.of(needs, per_token)
    shard = _shard(vocabulary_group, vocabulary_rows) if vocabulary_group else None
    out = _Outputs(hidden, V, wanted, shard is not None, _large)
    tokens = Tokens(labels, temperature, alpha, row_scale)
    settings = Settings(divergence, teacher_share, temperature_power, ignore_index, transforms, tail)
    rows = _Rows(tokens, ignore_index, max_supervised, shard.V if shard else V)
    workspace = _Workspace(hidden.device)
    teacher_rows = _TeacherRows(teacher, teacher_kind, rows, workspace)
    row_kernel = _row_kernel(backend, shard, teacher_rows, settings, any(wanted))
    chunks = _Chunks(hidden, HeadProducts(weight, bias, dtype), wanted, rows, workspace, row_kernel, out)
    own_size = shard.chunk(hidden.device) if shard else default_chunk(hidden.device, V, teacher_rows.columns)
    size = chunk_tokens or own_size
    for first in range(0, rows.count, size):
        chunks.add(slice(first, min(first + size, rows.count)))
    if rows.count == 0:
        out.grad_weight.zero_()
    if shard and wanted.hidden:
        shard.add_up_(out.grad_hidden)
    return out.as_tuple(per_token)


ARGUMENTS = tuple(inspect.signature(_linear_distillation).parameters)
linear_distillation = torch.library.custom_op("pocl_fast::linear_distillation", _linear_distillation, mutates_args=())


@linear_distillation.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    wanted = Needs.of(given["needs"], given["per_token"])
    sharded = bool(given["vocabulary_group"])
    return _Outputs(given["hidden"], given["weight"].shape[0], wanted, sharded, torch.empty).as_tuple(
        given["per_token"]
    )


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, needs: list[bool], per_token: bool) -> Needs:
        """Those that are to be computed with the loss: none where backward is to compute them."""
        return cls(*(need and not per_token for need in needs))


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

    def as_tuple(self, per_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        loss = self.loss if per_token else self.loss.sum()
        return loss, self.stats, self.grad_hidden, self.grad_weight, self.grad_bias


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def _large(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix; on a CPU from memory that is kept for the next loss, as fresh pages cost dearly."""
    if device.type == "cpu":
        return row_operator.backend_module("cpp").empty_rows(rows, columns, dtype)
    return torch.empty((rows, columns), dtype=dtype, device=device)


def _shard(group_name: str, rows: list[int]) -> VocabularyShard:
    from pocl_fast.loss.vocabulary_shards import VocabularyShard  # not every torch has torch.distributed

    return VocabularyShard(group_name, rows)


@dataclass
class _Chunks:
    """The work on one chunk of rows after another, added to the outputs."""

    hidden: Tensor
    head: HeadProducts
    needs: Needs
    rows: _Rows
    workspace: _Workspace
    row_kernel: Callable[..., tuple[Tensor, Tensor]]
    out: _Outputs

    def add(self, part: slice) -> None:
        hidden, head, out, dtype = self.rows.take(self.hidden, part), self.head, self.out, self.head.dtype
        logits = self.workspace.take("student", len(hidden), head.weight.shape[0])
        head.logits(hidden, logits)
        # a GPU multiplies gradients in the inputs' dtype; on a CPU they stay fp32, over the logits they came from
        apart = not on_cpu(hidden) and dtype != torch.float32 and any(self.needs)
        grad = self.workspace.take("grad", len(hidden), logits.shape[1], dtype) if apart else logits
        loss, stats = self.row_kernel(part, logits, self.rows.tokens_of(part), grad if any(self.needs) else None)
        self.rows.put(out.stats, stats, part, dim=1)
        self.rows.put(out.loss, loss, part)
        if self.needs.hidden:
            self.rows.put(out.grad_hidden, head.hidden_grad(grad, out.grad_hidden.dtype), part)
        if self.needs.weight:
            weight_grad_(out.grad_weight, grad, hidden, dtype, add=part.start > 0)
        if self.needs.bias:
            out.grad_bias += grad.sum(0, dtype=torch.float32)


# ---- rows and memory ----


class _Rows:
    """The rows that are multiplied: the supervised ones, with their labels and scales.

    On a GPU nothing is counted, which would stop it: `max_supervised` rows are taken, the supervised first, or all."""

    def __init__(self, tokens: Tokens, ignore_index: int, max_supervised: int, V: int) -> None:
        labels, row_scale = tokens.labels, tokens.row_scale
        counted = labels != ignore_index
        self.index: Tensor | None = None  # None: all, where they lie
        if on_cpu(labels):
            check_labels_within(labels, counted, V)
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
        self.factors = tokens.temperature, tokens.alpha
        self.count = len(self.labels)

    def tokens_of(self, part: slice) -> Tokens:
        temperature, alpha = (self.take(value, part) if value.numel() > 1 else value for value in self.factors)
        return Tokens(self.labels[part], temperature, alpha, self.row_scale[part])

    def take(self, x: Tensor, part: slice) -> Tensor:
        """A chunk of the rows of a tensor that has a row a token."""
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

    def __init__(self, tensors: list[Tensor], kind: str, rows: _Rows, workspace: _Workspace) -> None:
        self.tensors, self.kind, self.rows, self.workspace = tensors, kind, rows, workspace
        self.columns = 0  # of logits that are made here
        if kind == "linear":
            hidden, weight = tensors[:2]
            self.head = HeadProducts(weight, tensors[2] if len(tensors) > 2 else None, hidden.dtype)
            self.columns = len(weight)

    def of(self, part: slice, student: Tensor) -> tuple[Tensor, Tensor | None]:
        """A chunk's logits and no indices, or its log-probabilities and their indices."""
        if self.kind == "none":
            return student, None  # D is 0 then, and its row is in the cache
        rows, *indices = (self.rows.take(x, part) for x in self.tensors[: 2 if self.kind == "topk" else 1])
        if self.kind != "linear":
            return rows, indices[0] if indices else None
        out = self.workspace.take("teacher", len(rows), self.columns)
        self.head.logits(rows, out)
        return out, None


def _row_kernel(
    backend: str, shard: VocabularyShard | None, teacher: _TeacherRows, settings: Settings, needs_grad: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of a chunk, its student logits [n, V], its tokens, and of the gradient's place: the scaled losses [n]
    and the stats [7, n]."""

    def rows(part: slice, logits: Tensor, tokens: Tokens, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"needs_grad": needs_grad, "reduced": False, "grad": grad}
        values, indices = teacher.of(part, logits)
        if shard:
            return shard.distillation_rows(logits, values, tokens, settings, **options)[:2]
        return row_operator.rows_of(backend, logits, values, indices, tokens, settings, **options)[:2]

    return rows


# ---- autograd ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.per_token, ctx.backend = given["per_token"], given["backend"]
    differentiated = (given["hidden"], given["weight"], given["bias"])
    ctx.dtypes = tuple(None if x is None else x.dtype for x in differentiated)
    ctx.num_teacher = len(given["teacher"])
    if ctx.per_token:
        tokens = (given[name] for name in Tokens._fields)
        ctx.options = {name: value for name, value in given.items() if name not in TENSORS}
        ctx.save_for_backward(*differentiated, *tokens, *given["teacher"])
    else:
        ctx.grads = output[2:]  # not save_for_backward: handed over for good, see row_operator.py


def _backward(ctx: Any, upstream: Tensor | None, *_others: None) -> tuple[Any, ...]:
    nothing = [None] * ctx.num_teacher, *(None,) * (len(ARGUMENTS) - 4)
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
    """The gradients of a loss a token, whose factors are known now."""
    hidden, weight, bias, labels, temperature, alpha, row_scale, *teacher = ctx.saved_tensors
    tokens = Tokens(labels, temperature, alpha, row_scale * upstream)
    given = {"hidden": hidden, "weight": weight, "bias": bias, "teacher": teacher, **tokens._asdict(), **ctx.options}
    given["per_token"] = False
    _loss, _stats, *grads = linear_distillation(*(given[name] for name in ARGUMENTS))
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
