"""Folders that are whole or absent: written under another name, sealed with checksums, then renamed.

Does not know what the folders hold.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from pocl_fast.system.files import write_json
from pocl_fast.system.fingerprint import sha256_of

SEAL = "files.json"  # name -> size and SHA-256 of every other file


def seal(partial: Path, target: Path) -> None:
    """Writes the checksums of a folder's files into it, then renames it to `target`, replacing what is there."""
    write_json(partial / SEAL, {str(p.relative_to(partial)): _entry(p) for p in _files(partial)})
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None where its files are bit for bit those that were sealed."""
    try:
        entries = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {SEAL}, so it was not written to the end"
    except (OSError, ValueError) as error:
        return f"its {SEAL} cannot be read ({error})"
    for name, (size, digest) in entries.items():
        try:
            found = _entry(folder / name)
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
        if found[0] != size:
            return f"its {name} has {found[0]} of {size} bytes"
        if found[1] != digest:
            return f"its {name} is not what was written (checksum)"
    return None


def disk_trouble(error: BaseException) -> str | None:
    """What was wrong with the disk, if that is what an error raised while a library wrote a file means; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError) and "I/O error" in str(error):
        return str(error)
    return "torch could not write a file" if "inline_container" in str(error) else None  # torch.save


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _entry(path: Path) -> list[int | str]:
    with open(path, "rb") as file:
        digest = sha256_of(file)
        return [file.tell(), digest]
