"""What `--train` and `--dev` name, and the records in it, read anew each time.

Knows which reader is for what. Does not know what a record says (samples.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pocl_fast.records import json_lines
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.system.fingerprint import file_fingerprint


class Source(Protocol):
    """Records on disk or on the hub."""

    @property
    def name(self) -> str:
        """How the user named it: it begins every message about it."""
        ...

    @property
    def unit(self) -> str:
        """What a record's number counts: "line", "row" or "record"."""
        ...

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        """Each record with its number, from 1, without keeping them; what is wrong with it, in place of one that is
        none. `expected` says in errors what a record has."""
        ...

    def fingerprint(self) -> str:
        """Identifies the content."""
        ...

    def is_large(self) -> bool:
        """Whether the records are better not all in memory at once."""
        ...


LARGE = 1 << 28  # bytes; a larger file of samples is read in pieces, where it would take ten times as much


@dataclass(frozen=True)
class JsonLines:
    """A file of JSON Lines."""

    path: Path
    unit: str = "line"

    @property
    def name(self) -> str:
        return str(self.path)

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        return json_lines.objects(self.path, expected)

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)

    def is_large(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size >= LARGE


def source_of(given: str | Path) -> Source:
    """The reader of what is named. Raises `InputError` where there is none."""
    return JsonLines(Path(given))
