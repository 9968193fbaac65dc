"""Text and JSON files that are whole or as they were: written under another name, then renamed."""

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
