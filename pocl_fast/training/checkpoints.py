"""Checkpoints that are complete or absent: written under another name, sealed with checksums, then renamed.

Knows files. Does not know what a trainer puts into them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pocl_fast.system.errors import InputError
from pocl_fast.system.seal import damage

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def newest_whole(folder: Path, say: Callable[[str], object]) -> Path | None:
    """The newest undamaged checkpoint of a folder. Damaged ones are renamed to *.damaged, and `say` is told which."""
    for checkpoint in reversed(checkpoints(folder)):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        aside = checkpoint.with_name(checkpoint.name + ".damaged")
        say(f"checkpoint {checkpoint} is left out and renamed to {aside.name}: {wrong}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by their step."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((p for p in found if _CHECKPOINT.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def check_none_after(folder: Path, step: int) -> None:
    """Raises `InputError` where a folder holds checkpoints of later steps: they are of another training, and resuming
    from the newest would mix the two."""
    if later := [checkpoint.name for checkpoint in checkpoints(folder) if step_of(checkpoint) > step]:
        raise InputError(
            f"{folder} holds {', '.join(later)} of an earlier training: go on from there"
            " (resume_from_checkpoint=True), give another output_dir, or delete them"
        )


def check_resumable(checkpoint: Path, folder: Path) -> None:
    """Raises `InputError` where a checkpoint holds the model alone: a training that went on from it would begin with an
    empty optimizer and another learning rate."""
    states = ("optimizer*", "global_step*")  # a file, FSDP's folder; DeepSpeed's folder
    if any(True for pattern in states for _ in checkpoint.glob(pattern)):
        return
    raise InputError(
        f"cannot go on from {checkpoint}: it holds the model alone (save_only_model), without the optimizer's state."
        f" To train on from its weights as a new training, give the checkpoint as the student and another output"
        f" folder; to start again, delete {folder}"
    )


def best_path(folder: Path, stage: int, step: int) -> Path:
    """Where the weights of a stage's best evaluation are, after so many steps."""
    return folder / f"stage-{stage + 1}-best-{step}.safetensors"


def remove_old(folder: Path, limit: int | None) -> None:
    """Deletes checkpoints but for the newest `limit`; None keeps all."""
    for old in checkpoints(folder)[:-limit] if limit else ():
        shutil.rmtree(old, ignore_errors=True)


def remove_other_weights(folder: Path, best: set[Path]) -> None:
    """Deletes the weights of evaluations that are no longer the best of their stage."""
    for path in set(folder.glob("stage-*-best-*.safetensors")) - best:
        path.unlink(missing_ok=True)


# -- the weights alone -------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, path: Path, *, writes: bool = True) -> None:
    """Writes the weights that are trained, tied ones once, as safetensors. With sharded weights (FSDP) every rank
    calls, and one `writes`."""
    weights = {name: _whole(p) for name, p in model.named_parameters() if p.requires_grad}
    if not writes:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}. Free some space and run the same command again") from error


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Puts weights that `save_weights` wrote into a model. Raises `InputError` where they are missing or do not fit."""
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            if missing := {n for n, p in parameters.items() if p.requires_grad} ^ set(file.keys()):
                raise InputError(f"{path} holds the weights of another model: {sorted(missing)[0]} is in one alone")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                _put(parameters[name], file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}. Delete the run's folder to start it again") from error


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    gather = getattr(parameter, "full_tensor", None)  # a DTensor's
    return gather() if gather else parameter


def _put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        placed: Any = parameter
        value = distribute_tensor(value.to(placed.device_mesh.device_type), placed.device_mesh, placed.placements)
    parameter.copy_(value)
