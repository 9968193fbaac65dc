"""The precision of matrix products on a device, fp32 or bf16: by autocast, oneDNN's mode, frozen or rounded layers.

Knows where a choice that was made by timing is kept. Of models it knows that they have linear layers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocl_fast.loss.lm_head_products import cpp_products, set_bf16_way
from pocl_fast.models.product_speed import CpuProducts, Shapes, decide, describe, measure_speeds
from pocl_fast.models.rounded import rounded_linears
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json
from pocl_fast.system.fp32_products import fp32_products, rounds_to_bf16, set_fp32_products

PRECISION_FILE = "precision.json"  # in the folder of a run or a training: what its first step chose


@dataclass(frozen=True)
class Precision:
    """How matrix products are computed, resolved for one device. Weights and losses are fp32 in either case."""

    name: Literal["fp32", "bf16"]
    device: torch.device
    chosen: CpuProducts | None = None  # by timing, on a CPU

    def autocast(self) -> torch.autocast:
        """The context in which models run: bf16 autocast on a GPU. On a CPU it does nothing: `choose_precision` set the
        mode of the process."""
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu and self.name == "bf16")

    @property
    def rounds_layers(self) -> bool:
        """Whether linear layers that train on a CPU multiply in bf16 by rounding (rounded.py): as was chosen by timing,
        or where bf16 was asked for, the processor multiplies it, and no mode of oneDNN does."""
        if self.device.type != "cpu":
            return False
        if self.chosen is not None:
            return self.chosen.trained == "rounded" and _has_bf16()
        return self.name == "bf16" and _multiplies_bf16() and not rounds_to_bf16()

    def training(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The context of a model's forward and backward where it trains on a CPU; nothing elsewhere."""
        return rounded_linears(model) if self.rounds_layers else contextlib.nullcontext()

    def head_products(self, weight: Tensor) -> contextlib.AbstractContextManager[Any]:
        """The context of the linear loss within `training`: autocast, by which it rounds the inputs of the lm_head's
        products, where the backend has such products and they are faster."""
        rounds = self.rounds_layers and cpp_products(torch.bfloat16, weight) is not None
        return torch.autocast("cpu", dtype=torch.bfloat16) if rounds else contextlib.nullcontext()

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype in which a CPU multiplies the layers of a model that does not train (see `freeze_linears`): bf16
        where that was chosen and the processor multiplies it."""
        layers = self.chosen.layers if self.chosen else self.name
        return torch.bfloat16 if layers == "bf16" and self.device.type == "cpu" and _has_bf16() else torch.float32

    @property
    def of_teacher(self) -> str:
        """Identifies the precision of a teacher's outputs."""
        if self.chosen is None or self.chosen.layers == "bf16":
            return self.name
        return "bf16, layers in fp32" if self.chosen.mode == "bf16" and rounds_to_bf16() else "fp32"

    @property
    def of_training(self) -> str:
        """In what the weights that train are multiplied: "fp32" or "bf16"."""
        if self.chosen is None and self.device.type == "cpu" and self.name == "bf16":
            return "bf16" if self.rounds_layers or rounds_to_bf16() else "fp32"
        return self.name if self.chosen is None else self.chosen.of_training

    def set_modes(self) -> None:
        """Sets for the process how a CPU multiplies, where that was chosen by timing."""
        if self.chosen is not None:
            set_fp32_products(self.chosen.mode)
            set_bf16_way(self.chosen.head)


def choose_precision(
    precision: str,
    device: torch.device,
    folder: Path | None = None,
    *,
    shapes: Callable[[], Shapes] = Shapes,
    say: Callable[[str], object] = print,
) -> Precision:
    """Resolves "auto" and, on a CPU, sets oneDNN's mode for the process. Every rank must call.

    On a CPU "bf16" lets oneDNN round the inputs of fp32 matrix products to bf16 where it has a mode for that (AMX);
    sums and results, so also logits, stay fp32. Elsewhere that mode's products are exact fp32 and up to 2x faster than
    MKL's on AMD processors, so that "fp32" is the same mode; and layers that train are rounded (`rounds_layers`).

    "auto" on a CPU that multiplies bf16 times each way for a model of `shapes` and takes the fastest; `say` gets a
    line. The choice is kept in `folder` and taken from there the next time. Raises `InputError` where that file holds
    none.
    """
    if device.type == "cuda":
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return Precision("bf16" if precision == "bf16" else "fp32", device)
    if precision == "auto":
        chosen, line = ranks.from_first(lambda: _kept_choice(folder, shapes()))
        say(line)
        if chosen is not None:
            made = Precision(chosen.name, device, chosen)
            made.set_modes()
            return made
    exact = _has_bf16() and not rounds_to_bf16()
    set_fp32_products("bf16" if precision == "bf16" or exact else "ieee")
    set_bf16_way("bf16")
    return Precision("bf16" if precision == "bf16" else "fp32", device)


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions for it; oneDNN takes bf16 of others too, and converts."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _kept_choice(folder: Path | None, shapes: Shapes) -> tuple[CpuProducts | None, str]:
    """The choice that is kept in the folder, or a new one, which is then kept there; and a line about it. None for fp32
    where nothing is to be chosen."""
    path = None if folder is None else folder / PRECISION_FILE
    kept = path is not None and path.exists()
    if not _has_bf16():
        return None, "precision: fp32, this processor multiplies no bf16" + (f" as {path} asks for" if kept else "")
    if shapes.are_small:
        return None, "precision: fp32, for the models' layers are so small that bf16 is no faster"
    if path is not None and kept:
        chosen = _read(path)
        said = (
            f"precision: {chosen.layers} for layers that do not train and {chosen.of_training} for weights that do,"
            f" which an earlier step chose ({PRECISION_FILE})"
        )
        return chosen, said
    speeds = measure_speeds(shapes)
    chosen = decide(speeds)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(chosen))
    return chosen, describe(chosen, speeds)


def _read(path: Path) -> CpuProducts:
    try:
        return CpuProducts.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} holds no choice of a precision ({error}): delete it to choose anew") from error


def exact_products() -> contextlib.AbstractContextManager[None]:
    """fp32 products of plain tensors are exact within it, whatever `choose_precision` set for the process.

    For attention on a CPU, whose products are so small that oneDNN spends most of their time on its start: up to ten
    times what MKL takes.
    """
    return fp32_products("ieee")


def exact_backward(output: Tensor, *inputs: Tensor) -> None:
    """The same for the way back from `output` [...] to `inputs`: from when the gradient of `output` is known until that
    of an input is. The gradient of a sample of 63 tokens takes 0.5 ms so, and 1.9 ms in oneDNN's mode (a Zen 4)."""
    if not output.requires_grad or output.device.type != "cpu":
        return
    before: list[str] = []

    def leave() -> None:
        if before:
            set_fp32_products(before.pop())

    def enter(_: Tensor) -> None:
        if not before:
            before.append(set_fp32_products("ieee"))
            torch.autograd.Variable._execution_engine.queue_callback(leave)  # where no input's gradient is asked for

    output.register_hook(enter)
    for one in inputs:
        if one.requires_grad:
            one.register_hook(lambda _: leave())
