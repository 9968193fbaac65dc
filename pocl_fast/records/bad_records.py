"""Records that cannot be trained on: what is wrong with each, and whether that stops the reading or is counted."""

from __future__ import annotations

from typing import Literal

from pocl_fast.system.errors import InputError

Policy = Literal["error", "skip"]


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

    def found(self, error: BadRecord, line: int) -> None:
        """Counts a record that is left out. Raises `error` where none may be."""
        if self._policy == "error":
            raise error
        self._lines.setdefault(error.kind, []).append(line)

    @property
    def counts(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What is wrong -> the lines of such records."""
        return tuple((kind, tuple(lines)) for kind, lines in self._lines.items())
