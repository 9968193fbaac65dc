"""Whether a model gives packed samples the logits that each has alone: tried on a few short random samples.

Knows families that do not pack. Does not know how attention is computed (packed_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_fast.data.encoding import EncodedSample
from pocl_fast.data.packed import pack
from pocl_fast.models.packed_attention import LengthsLost, enable_packing, register, use_row_mask, why_never_packed
from pocl_fast.models.packed_forward import forward_kwargs
from pocl_fast.models.placement import input_device

PACKING_TOLERANCE = 1e-2  # relative; families that do not support packing are off by 0.02 to 1
KERNEL_TOLERANCE = 0.1  # between two attention kernels: 0.01 to 0.06 in bf16, by depth


def packing_ready(
    model: nn.Module,
    say: Callable[[str], object],
    *,
    device: torch.device | str | None = None,
    trains: bool = False,
) -> bool:
    """Enables packing (see `enable_packing`) and returns whether it holds for the model. `say` is told how the model
    attends, or that its samples are padded instead."""
    enable_packing(model, say, device=device, trains=trains)
    return packing_holds(model, say)


def packing_holds(model: nn.Module, say: Callable[[str], object] | None = None) -> bool:
    """Whether a model with packing enabled gives packed samples the logits that each has alone. `say` is told where it
    does not, and why if that is known."""
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
    """How far the logits of packed samples are off, relative to the largest logit: around 1e-6 (fp32) where packing
    holds, 0.02 and more where a family does not support it. In bf16 the logits of a deep model differ by as much
    between two attention kernels, so the kernel's error is measured apart from that of packing."""

    leak: float  # a sample packed behind one sample, against the same behind another of the same length
    packed: float  # a sample packed behind another, against the model without packing
    alone: float  # a sample packed alone, against the model without packing: the kernel's rounding

    @property
    def hold(self) -> bool:
        allowed = max(PACKING_TOLERANCE, 3 * self.alone)
        return self.leak < PACKING_TOLERANCE and self.packed < allowed and self.alone < KERNEL_TOLERANCE


def packing_errors(model: nn.Module, vocab_size: int) -> PackingErrors:
    """The errors on three short random samples. Raises `Refused` where the model does not run on packed rows."""
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
            except (LengthsLost, torch.OutOfMemoryError, torch.AcceleratorError):  # the GPU's own
                raise
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                raise Refused(str(error).strip().splitlines()[0]) from error
    finally:
        model.train(was_training)
    largest = want.abs().max().clamp_min(1e-6)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / largest)

    return PackingErrors(apart(behind_first, behind_other), apart(behind_first, want), apart(alone, want))
