"""Text and JSON files that are whole or as they were: written under another name, then renamed. And what lies where a
path that is not there would lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its pieces in turn, under a temporary name, then renames: `path` is whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; `path` is whole or as it was."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The values of a log of JSON Lines that this program writes; a line cut off by a crash is left out."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def near_paths(given: str) -> list[str]:
    """What lies where a path that is not there would lie, written as it is: "runs/one" for "runs/oen"."""
    parent, _, _ = given.rpartition("/")
    try:
        folder = Path(parent or ("/" if given.startswith("/") else ".")).expanduser()
        return [f"{parent}/{path.name}" if "/" in given else path.name for path in sorted(folder.iterdir())]
    except (OSError, ValueError, RuntimeError):  # no name that a folder can have, too; a home that is not there
        return []
