"""What can be decided about answers, as data: what is counted of it, how many, and what is said.

Does not know who decides, nor why.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Decision(NamedTuple):
    """A decision, by what is counted of it."""

    answers: str  # which answers
    records: str = ""  # which records, where these are told first
    advice: str = ""


class Note(NamedTuple):
    """What was decided, of how many answers, and of which lines."""

    decision: Decision
    answers: int
    lines: tuple[int, ...]

    @property
    def counts(self) -> dict[str, int]:
        """What is counted, and how many they are."""
        records = {self.decision.records: len(self.lines)} if self.decision.records else {}
        return records | {self.decision.answers: self.answers}

    def describe(self, lines: str) -> str:
        """In words; `lines` says where the records are."""
        (what, count), *others = self.counts.items()
        parts = [f"{what}: {count} ({lines})", *(f"{other}: {number}" for other, number in others)]
        return "; ".join([*parts, *([self.decision.advice] if self.decision.advice else [])])


Notes: TypeAlias = tuple[Note, ...]
