"""Files that are whole or as they were: written under another name, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames: `path` is whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_text` writes text."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
