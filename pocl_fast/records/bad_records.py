"""Records that cannot be trained on: what is wrong with each, and whether that stops the reading or is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from pocl_fast.system.errors import InputError

Policy = Literal["error", "skip"]
Counts: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]  # what is wrong, and the lines of such records


class BadRecord(InputError):
    """A record that is none, or that no prompt can be made of. `kind` says in a few words what is wrong, for counts."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class BadRecords:
    """What is done about bad records: the first stops the reading ("error"), or each is left out and counted."""

    def __init__(self, policy: Policy = "error") -> None:
        self._policy: Policy = policy
        self._lines: dict[str, list[int]] = {}
        self._first: tuple[int, BadRecord] | None = None  # by its line: what is wrong is not found in their order

    def found(self, error: BadRecord, line: int) -> None:
        """Counts a record that is left out. Raises `error` where none may be."""
        if self._policy == "error":
            raise error
        if self._first is None or line < self._first[0]:
            self._first = line, error
        self._lines.setdefault(error.kind, []).append(line)

    @property
    def counts(self) -> Counts:
        """What is wrong -> the lines of such records; the kind of the first of them first."""
        counts = ((kind, tuple(sorted(lines))) for kind, lines in self._lines.items())
        return tuple(sorted(counts, key=lambda count: count[1]))

    def check_left(self, good: int, name: str, unit: str = "line") -> None:
        """Raises `InputError` where every record of `name` was bad."""
        if not good and self._first is not None:
            raise InputError(f"{name}: no record is left, {describe(self.counts, unit)}; the first: {self._first[1]}")


def describe(counts: Counts, unit: str = "line") -> str:
    """The counts in words: "3 bad records left out: not JSON 1 (line 4), an image 2 (lines 7, 9)". `unit` is what the
    numbers count."""
    total = sum(len(lines) for _, lines in counts)
    kinds = ", ".join(f"{kind} {len(lines):,} ({some_lines(lines, unit)})" for kind, lines in counts)
    return f"{total:,} bad record{'s' if total > 1 else ''} left out: {kinds}"


def some_lines(lines: Sequence[int], unit: str = "line") -> str:
    """The first lines of some, in words."""
    shown = ", ".join(str(line) for line in lines[:5])
    return f"{unit}{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 5 else ''}"
