"""The precision of matrix products on a device, fp32 or bf16: by autocast, oneDNN's mode or frozen layers.

Does not know models.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from pocl_fast.system.fp32_products import fp32_products, rounds_to_bf16, set_fp32_products


@dataclass(frozen=True)
class Precision:
    """How matrix products are computed, resolved for one device. Weights and losses are fp32 in either case."""

    name: Literal["fp32", "bf16"]
    device: torch.device

    def autocast(self) -> torch.autocast:
        """The context in which models run: bf16 autocast on a GPU. On a CPU it does nothing: `choose_precision` set the
        mode of the process."""
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu and self.name == "bf16")

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype in which a CPU multiplies the layers of a model that does not train (see `freeze_linears`): bf16
        where that was chosen and the processor multiplies it."""
        fast = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if self.name == "bf16" and fast and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16
        return torch.float32


def choose_precision(precision: str, device: torch.device) -> Precision:
    """Resolves "auto" and, on a CPU, sets oneDNN's mode for the process.

    On a CPU "bf16" lets oneDNN round the inputs of fp32 matrix products to bf16 where the CPU multiplies these faster;
    sums and results, so also logits, stay fp32. Where it does not, products are exact fp32 and up to 2x faster than
    MKL's on AMD processors, so that "fp32" is the same mode.
    """
    if device.type == "cuda":
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    else:
        has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
        if precision == "auto":
            precision = "bf16" if has_bf16 else "fp32"
        exact = has_bf16 and not rounds_to_bf16()
        set_fp32_products("bf16" if precision == "bf16" or exact else "ieee")
    return Precision("bf16" if precision == "bf16" else "fp32", device)


def exact_products() -> contextlib.AbstractContextManager[None]:
    """fp32 products of plain tensors are exact within it, whatever `choose_precision` set for the process.

    For attention on a CPU, whose products are so small that oneDNN spends most of their time on its start: up to ten
    times what MKL takes.
    """
    return fp32_products("ieee")
