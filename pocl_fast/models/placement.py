"""The device that an option names; and models whose parts lie on several devices, in main memory or on disk, by
accelerate's hooks: each part is brought to the device it runs on when it runs.

Knows accelerate. Does not know what the models are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocl_fast.system.errors import InputError

_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def choose_device(device: str, *, option: str = "device") -> torch.device:
    """ "auto" is the first CUDA (or ROCm) device where there is one, else the CPU."""
    if device.strip().lower() == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device.strip().lower())
    except RuntimeError as error:
        raise InputError(f"{option} {device}: not a device that torch knows, as cpu, cuda or cuda:1 are") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{option} {device}: this torch ({torch.__version__}) sees no CUDA device")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{option} {device}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"{option} {device}: this torch ({torch.__version__}) cannot use it") from error
    return chosen


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model lie.

    device_map: "auto" fills the GPUs, then main memory, then the disk; or the name of each part and its device
        ("cuda:0", "cpu", "disk"). Parts in main memory beside a GPU, and on disk, come to the GPU layer by layer.
    max_memory: bytes (or "10GiB") that "auto" may use of each device, by its number or "cpu".
    offload_folder: for what is on disk.
    """

    device_map: str | Mapping[str, str | int]
    max_memory: Mapping[str | int, str | int] | None = None
    offload_folder: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.device_map, str) and self.device_map not in _SPREADS:
            raise InputError(
                f"device_map {self.device_map!r}: must be one of {', '.join(_SPREADS)}, or each part's device"
            )

    def arguments(self) -> dict[str, Any]:
        """As transformers' `from_pretrained` takes it."""
        arguments: dict[str, Any] = {
            "device_map": self.device_map if isinstance(self.device_map, str) else dict(self.device_map)
        }
        if self.max_memory is not None:
            arguments["max_memory"] = dict(self.max_memory)
        if self.offload_folder is not None:
            arguments["offload_folder"] = str(self.offload_folder)
        return arguments

    def dispatch(self, model: Any) -> Any:
        """Places a model that is in memory whole."""
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        device_map: Any = self.device_map
        if isinstance(device_map, str):
            unsplit = sorted(getattr(model, "_no_split_modules", None) or [])
            memory: Any = None if self.max_memory is None else dict(self.max_memory)
            if device_map != "sequential":
                low = device_map == "balanced_low_0"
                memory = get_balanced_memory(model, memory, no_split_module_classes=unsplit, low_zero=low)
            device_map = infer_auto_device_map(model, memory, no_split_module_classes=unsplit)
        folder = None if self.offload_folder is None else str(self.offload_folder)
        return dispatch_model(model, dict(device_map), offload_dir=folder, force_hooks=True)


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens: the device its embedding runs on."""
    embedding = model.get_input_embeddings()
    return _runs_on(embedding) or embedding.weight.device


def output_device(model: Any) -> torch.device:
    """Where a model makes its logits: the device its lm_head runs on."""
    head = model.get_output_embeddings()
    return _runs_on(head) or head.weight.device


def resident(module: nn.Module, name: str, device: torch.device | Literal["cpu"] | None = None) -> Tensor:
    """A copy of a module's tensor by its (dotted) name, wherever it lies, on `device` or where the module runs."""
    from accelerate.utils.modeling import align_module_device

    owner, _, name = name.rpartition(".")
    module = module.get_submodule(owner)
    with align_module_device(module, device or _runs_on(module)):
        return getattr(module, name).detach().clone()


def _runs_on(module: nn.Module) -> torch.device | None:
    """The device to which accelerate's hook brings a module; None where it has no such hook."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # several in a sequence
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    return None
