"""How much memory a forward or a training step takes: it is run on the meta device, and the sizes of its tensors that
are alive at a time are added up.

Knows models and losses by the sizes of their tensors. Does not know which step of a run it is, nor options.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pocl_fast.loss.linear_operator import default_chunk
from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.packed_forward import decoder_of

HEAP = 32 << 20  # bytes; glibc takes smaller blocks from its heap, which stays the process's once it has grown
ATTENTION = "pocl_plan"  # the name under which transformers calls `_attention`


class Peak(NamedTuple):
    """The most bytes at a time: of what is alive, and of what a process on a CPU then has, where freed small blocks
    stay its own: the most of small blocks and the most of large ones, whenever each was."""

    alive: int
    resident: int


class PeakMeter(TorchDispatchMode):
    """Adds up the storages that are made within it, each from when it is made to when nothing holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self._most = 0  # bytes
        self._live, self._peaks = [0, 0], [0, 0]  # of small and of large blocks
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        size = storage.nbytes()
        self._add(size, size)
        self._known[place] = weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._add(-size, size)
        self._known.pop(place, None)

    def _add(self, more: int, size: int) -> None:
        kind = int(size >= HEAP)
        self.live += more
        self._live[kind] += more
        self._most, self._peaks[kind] = max(self._most, self.live), max(self._peaks[kind], self._live[kind])

    @property
    def peak(self) -> Peak:
        return Peak(self._most, sum(self._peaks))

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Counts these nowhere: weights, which are there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = None


class _Attention(torch.autograd.Function):
    """Attention by a kernel that keeps its inputs, its output and a number a row for backward, and no T x T."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """[B, heads, T, size] -> [B, T, heads, size], as transformers calls it."""
    return _Attention.apply(q, k, v).transpose(1, 2).contiguous(), None


class _Loss(torch.autograd.Function):
    """The sizes of the linear loss: gradients made in forward, a chunk of both models' logits at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, needs_weight: bool, rows: int, columns: int) -> Tensor:
        logits = hidden.new_empty((rows, columns), dtype=torch.float32)  # noqa: F841 (its size counts until the end)
        grad_weight = hidden.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
        ctx.grads = torch.empty_like(hidden), grad_weight if needs_weight else None
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        return *grads, None, None, None


def training_peak(
    model: Any,
    tokens: int,
    supervised: int,
    *,
    teacher_columns: int,
    device: torch.device,
    bf16: bool,
    checkpointing: bool,
    accumulates: bool,
) -> Peak:
    """Bytes of a micro-batch's forward and backward beside weights and optimizer: activations, gradients, the loss.

    `model` is on the meta device. `teacher_columns` are the logits a token that the teacher's lm_head makes (0 for a
    top-k). `bf16` is autocast on a GPU. With `accumulates` the gradients of an earlier micro-batch are there too.
    """
    inner = causal_lm(model)
    body, head = decoder_of(inner), inner.get_output_embeddings()
    rows = min(supervised, default_chunk(device, len(head.weight), teacher_columns))
    meter = PeakMeter()
    meter.ignore([*model.parameters(), *model.buffers()])
    with as_it_runs(model, bf16=bf16, checkpointing=checkpointing), meter:
        for _ in range(2 if accumulates else 1):
            hidden = body(**_arguments(1, tokens)).last_hidden_state.flatten(0, 1)
            chosen = hidden.index_select(0, torch.empty(supervised, dtype=torch.int64, device="meta"))
            del hidden
            columns = len(head.weight) + teacher_columns
            _Loss.apply(chosen, head.weight, head.weight.requires_grad, rows, columns).backward()
            del chosen
    for weight in model.parameters():
        weight.grad = None
    return meter.peak


@torch.no_grad()
def forward_peak(model: Any, rows: int, tokens: int, *, bf16: bool, cache: bool = False) -> tuple[Peak, int]:
    """Bytes at the peak of a decoder's forward over [rows, tokens] without gradients, and those that stay: its output,
    and with `cache` its keys and values."""
    body = decoder_of(causal_lm(model))
    meter = PeakMeter()
    meter.ignore([*model.parameters(), *model.buffers()])
    with as_it_runs(model, bf16=bf16, checkpointing=False), meter:
        output = body(**_arguments(rows, tokens, cache=cache))
        stays = meter.live
        del output
    return meter.peak, stays


def _arguments(rows: int, tokens: int, *, cache: bool = False) -> dict[str, Any]:
    ids = torch.empty((rows, tokens), dtype=torch.int64, device="meta")
    # a mask of four dimensions is taken as it is, so none of T x T is made
    mask = torch.empty((1, 1, 1, 1), dtype=torch.bool, device="meta")
    return {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "use_cache": cache}


@contextlib.contextmanager
def as_it_runs(model: Any, *, bf16: bool, checkpointing: bool) -> Iterator[None]:
    """Within it a model on the meta device makes the tensors that it makes where it runs: attention without T x T, with
    `bf16` linear layers that autocast rounds, and with `checkpointing` activations of one layer at a time."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    inner = causal_lm(model)
    config, before, training = inner.config, inner.config._attn_implementation, model.training
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)] if bf16 else []
    try:
        config._attn_implementation = ATTENTION
        for linear in linears:
            linear.forward = functools.partial(_autocast_linear, linear)  # type: ignore[method-assign]
        if checkpointing:
            _switch(inner, "enable")({"use_reentrant": False, "preserve_rng_state": False})
        model.train(checkpointing or training)
        yield
    finally:
        for linear in linears:
            del linear.forward
        if checkpointing:
            _switch(inner, "disable")()
        config._attn_implementation = before
        model.train(training)


def _switch(model: Any, what: str) -> Any:
    """transformers' method, by the name that it has since 5.24 or by the older one."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


def _autocast_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.bfloat16()
    return nn.functional.linear(x.bfloat16(), linear.weight.bfloat16(), bias)
