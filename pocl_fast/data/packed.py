"""Padding-free batches: several samples in one row of tokens, and how a model runs on them.

Knows token layouts, and asks packed_attention.py how a model attends. Does not know losses or the curriculum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_fast.data.records import EncodedSample
from pocl_fast.models.packed_attention import (
    LengthsLost,
    enable_packing,
    needs_no_mask,
    register,
    use_row_mask,
    why_never_packed,
)
from pocl_fast.models.placement import input_device

PACKING_TOLERANCE = 1e-2  # relative; families that do not support packing are off by 0.02 to 1
KERNEL_TOLERANCE = 0.1  # between two attention kernels: 0.01 to 0.06 in bf16, by depth
DEVICE_ERROR = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)  # of the GPU itself; torch 2.8 and later


@dataclass(frozen=True)
class PackedBatch:
    """B samples in one row of T tokens, of which N are supervised (predict a response token)."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sample
    lengths: tuple[int, ...]  # B sample lengths; they add up to T
    supervised: Tensor  # [N] int64: positions whose next token is in a response
    labels: Tensor  # [N] int64: these next tokens
    counts: tuple[int, ...]  # supervised tokens of each sample; they add up to N

    def to(self, device: torch.device | str) -> PackedBatch:
        move = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "supervised", "labels")}
        return PackedBatch(lengths=self.lengths, counts=self.counts, **move)


def pack(samples: Sequence[EncodedSample]) -> PackedBatch:
    """The samples one behind the other, in the order given. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("pack: no samples")
    input_ids: list[int] = []
    position_ids: list[int] = []
    supervised: list[int] = []
    labels: list[int] = []
    for sample in samples:
        first = len(input_ids) + len(sample.prompt_ids) - 1  # the prompt's last token predicts the response's first
        supervised.extend(range(first, first + len(sample.response_ids)))
        labels.extend(sample.response_ids)
        input_ids.extend(sample.prompt_ids)
        input_ids.extend(sample.response_ids)
        position_ids.extend(range(len(sample)))
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        lengths=tuple(len(sample) for sample in samples),
        supervised=torch.tensor(supervised),
        labels=torch.tensor(labels),
        counts=tuple(len(sample.response_ids) for sample in samples),
    )


def token_budget_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Positions in `lengths` grouped so that each group's sum stays within `max_tokens` (one longer item stands alone).

    Longest first, so that the peak of memory comes at the start and not at the end.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    used = 0
    for i in order:
        if not batches or used + lengths[i] > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += lengths[i]
    return batches


def forward_kwargs(model: Any, batch: PackedBatch) -> dict[str, Any]:
    """The arguments with which a transformers model whose packing is enabled, or its body, runs on a packed batch."""
    device = batch.input_ids.device
    ends = torch.tensor((0, *batch.lengths), device=device).cumsum(0).to(torch.int32)
    longest = max(batch.lengths)
    # transformers takes a mask of four dimensions as it is, and makes none; ours looks at no mask of one entry
    mask = {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)} if needs_no_mask(model) else {}
    return {
        **mask,
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "packed_lengths": batch.lengths,
    }


def supervised_logits(model: nn.Module, batch: PackedBatch, *, packed: bool) -> Tensor:
    """Logits [N, V] at the supervised positions; the lm_head never meets the others where `packed`.

    `packed=False` pads the samples into a rectangle instead, for the few families where packing does not hold.
    """
    if packed:
        return model(**forward_kwargs(model, batch), logits_to_keep=batch.supervised).logits[0]
    padded, where = padded_kwargs(batch)
    return model(**padded).logits.flatten(0, 1)[where]


def supervised_hidden(body: nn.Module, batch: PackedBatch, *, packed: bool) -> Tensor:
    """Final hidden states [N, H] at the supervised positions, from a model's body (all but the lm_head)."""
    if packed:
        hidden = body(**forward_kwargs(body, batch)).last_hidden_state[0]
        return hidden[batch.supervised.to(hidden.device)]  # the body's layers may lie on several devices
    padded, where = padded_kwargs(batch)
    hidden = body(**padded).last_hidden_state.flatten(0, 1)
    return hidden[where.to(hidden.device)]


def padded_kwargs(batch: PackedBatch) -> tuple[dict[str, Any], Tensor]:
    """The arguments with which a model runs on a batch as a right-padded rectangle [B, longest], and where its
    supervised positions are in the flattened one."""
    device, longest = batch.input_ids.device, max(batch.lengths)
    lengths = torch.tensor(batch.lengths, device=device)
    rows = torch.arange(len(batch.lengths), device=device).repeat_interleave(lengths)
    places = rows * longest + batch.position_ids[0]
    ids = torch.zeros(len(batch.lengths) * longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    ids[places] = batch.input_ids[0]
    mask[places] = 1
    shape = (len(batch.lengths), longest)
    return {"input_ids": ids.view(shape), "attention_mask": mask.view(shape), "use_cache": False}, places[
        batch.supervised
    ]


def packing_ready(
    model: nn.Module,
    say: Callable[[str], object],
    *,
    device: torch.device | str | None = None,
    trains: bool = False,
) -> bool:
    """Enables packing (see `enable_packing`), and whether it holds for the model; `say` is told how the model attends,
    and where it is padded instead."""
    enable_packing(model, say, device=device, trains=trains)
    return packing_holds(model, say)


def packing_holds(model: nn.Module, say: Callable[[str], object] | None = None) -> bool:
    """Whether a model's logits of packed samples are those of each alone; its packing is enabled. `say` is told where
    they are not, and why where that is known."""
    register()
    vocab_size: Any = model.config.vocab_size  # type: ignore[union-attr]
    reason = why_never_packed(model)
    holds = False
    if reason is None:
        try:
            holds = packing_errors(model, vocab_size).hold
        except LengthsLost:
            use_row_mask(model, say)
            holds = packing_errors(model, vocab_size).hold
        except Refused as refusal:
            reason = str(refusal)
    if not holds and say is not None:
        why = f" ({reason})" if reason else ""
        name = type(model).__name__
        say(f"{name} does not support packed batches{why}: they are padded instead, which is slower")
    return holds


class Refused(Exception):
    """A model raised at a packed row what it does not raise at a plain one."""


class PackingErrors(NamedTuple):
    """How far logits of packed samples are off, relative to the largest logit: around 1e-6 (fp32) where packing holds,
    0.02 and more where a family does not support it. In bf16 a deep model's logits differ by as much between two
    attention kernels, so that what a kernel does is told apart from what packing does."""

    leak: float  # a sample behind one of two others of one length
    packed: float  # behind another, against the model without packing
    alone: float  # packed alone, against the model without packing: the kernel's rounding

    @property
    def hold(self) -> bool:
        allowed = max(PACKING_TOLERANCE, 3 * self.alone)
        return self.leak < PACKING_TOLERANCE and self.packed < allowed and self.alone < KERNEL_TOLERANCE


def packing_errors(model: nn.Module, vocab_size: int) -> PackingErrors:
    """Of short random samples. Raises `Refused` where the model does not run on packed rows."""
    generator = torch.Generator().manual_seed(0)
    device = input_device(model)
    first, other, sample = (torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in (7, 7, 12))

    def packed(*rows: list[int]) -> Tensor:
        samples = [EncodedSample(i, tuple(row[:3]), tuple(row[3:]), False) for i, row in enumerate(rows)]
        return model(**forward_kwargs(model, pack(samples).to(device))).logits[0, -len(sample) :].float()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            want = model(input_ids=torch.tensor([sample], device=device), use_cache=False).logits[0].float()
            try:
                behind_first, behind_other, alone = packed(first, sample), packed(other, sample), packed(sample)
            except (LengthsLost, torch.OutOfMemoryError, DEVICE_ERROR):
                raise
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                raise Refused(str(error).strip().splitlines()[0]) from error
    finally:
        model.train(was_training)
    largest = want.abs().max().clamp_min(1e-6)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / largest)

    return PackingErrors(apart(behind_first, behind_other), apart(behind_first, want), apart(alone, want))
