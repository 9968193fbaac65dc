"""Checkpoints that are complete or absent: written under another name, sealed with checksums, then renamed.

Knows files. Does not know what a trainer puts into them.
"""

from __future__ import annotations

import hashlib
import json
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
from pocl_fast.system.files import write_json

SEAL = "files.json"  # name -> size and SHA-256 of every other file
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def seal(partial: Path, target: Path) -> None:
    """Notes the checksums of a folder's files in it and renames it to `target`, in the place of what is there."""
    write_json(partial / SEAL, {str(p.relative_to(partial)): _entry(p) for p in _files(partial)})
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is whole: its files are those that were sealed, bit for bit."""
    try:
        entries = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {SEAL}, so it was not written to the end"
    except (OSError, ValueError) as error:
        return f"its {SEAL} cannot be read ({error})"
    for name, (size, digest) in entries.items():
        try:
            found = _entry(checkpoint / name)
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
        if found[0] != size:
            return f"its {name} has {found[0]} of {size} bytes"
        if found[1] != digest:
            return f"its {name} is not what was written (checksum)"
    return None


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


def disk_trouble(error: BaseException) -> str | None:
    """What was wrong with the disk, where that is what an error of a library's writing means."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError) and "I/O error" in str(error):
        return str(error)
    return "torch could not write a file" if "inline_container" in str(error) else None  # torch.save


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _entry(path: Path) -> list[Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return [file.tell(), digest.hexdigest()]


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
