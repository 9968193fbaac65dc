"""What the length limits and the options took from a data set, in words.

Knows counts and line numbers. Does not know samples nor tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pocl_fast.data.control_text import KeptAsText
from pocl_fast.data.encoded import Fitted
from pocl_fast.data.long_prompts import Rule, Shortenings
from pocl_fast.records import bad_records
from pocl_fast.records.bad_records import some_lines
from pocl_fast.system.errors import InputError
from pocl_fast.templates import unused_fields
from pocl_fast.templates.decisions import Notes


class LengthLimits(Protocol):
    """How long samples may be, and what is done about prompts that are longer."""

    @property
    def max_length(self) -> int: ...
    @property
    def max_prompt_length(self) -> int: ...
    @property
    def long_prompts(self) -> Any: ...


def _counts() -> array[int]:
    return array("i")  # 4 bytes for each of millions of samples


@dataclass(frozen=True)
class SampleLengths:
    """How many tokens each sample had before the limits, and how many are left; samples that are left out too, in
    order."""

    prompts: array[int] = field(default_factory=_counts)  # before the first answer that is trained on
    samples: array[int] = field(default_factory=_counts)  # in all
    shortened: array[int] = field(default_factory=_counts)  # in all, its prompt within the limit; 0: left out
    kept: array[int] = field(default_factory=_counts)  # in all, within both limits; 0 for one left out

    def add(self, given: Fitted, used: Fitted) -> None:
        """Takes the next sample in: as it was, and as it is used."""
        self.prompts.append(given.asked)
        self.samples.append(given.length)
        self.shortened.append(0 if used.encoded is None else used.length)
        self.kept.append(0 if used.encoded is None else len(used.encoded))


@dataclass(frozen=True)
class LengthReport:
    """What the length limits and the options did to a data set; `skipped` and `truncated` hold line numbers."""

    samples: int
    skipped: tuple[int, ...] = ()
    truncated: tuple[int, ...] = ()
    unused: tuple[tuple[str, int], ...] = ()  # fields that no model is told, and how many records have them
    unwritten: tuple[tuple[str, tuple[int, ...]], ...] = ()  # what the template left out, and of which lines
    untrained: tuple[int, ...] = ()  # lines of samples that were left out, for nothing in them is trained on
    notes: Notes = ()  # what else was decided about answers
    bad: bad_records.Counts = ()  # what was wrong with the records that were left out for it, and their lines
    control: KeptAsText = field(default_factory=KeptAsText)  # control tokens that stand in texts
    shortened: Shortenings = field(default_factory=Shortenings)
    unit: str = "line"  # what the line numbers count, as `Sample.unit`
    before: SampleLengths = field(default_factory=SampleLengths, repr=False)

    def describe(self, name: str) -> str:
        """In one line; `name` stands for the data set."""

        def some(lines: Sequence[int]) -> str:
            return some_lines(lines, self.unit)

        parts = [f"{name}: {self.samples} samples"]
        if self.bad:
            parts.append(bad_records.describe(self.bad, self.unit))
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped for a prompt over the limit ({some(self.skipped)})")
        if self.shortened.lines:
            parts.append(self.shortened.describe(some(self.shortened.lines)))
        if self.truncated:
            parts.append(f"{_responses(len(self.truncated))} cut to the length limit ({some(self.truncated)})")
        if self.untrained:
            parts.append(f"{len(self.untrained)} left out: no answer has reasoning ({some(self.untrained)})")
        parts += [note.describe(some(note.lines)) for note in self.notes]
        if self.unused:
            parts.append(unused_fields.describe(self.unused))
        for what, lines in self.unwritten:
            purpose = ", as many templates do on purpose" if what == unused_fields.EARLIER_REASONING else ""
            parts.append(f"the template does not write the {what} of {len(lines)} ({some(lines)}){purpose}")
        if self.control.lines:
            parts.append(self.control.describe(some(self.control.lines)))
        return "; ".join(parts)


def check_limits(max_length: int, max_prompt_length: int) -> None:
    """Raises `InputError` where a longest prompt would leave no room for a response."""
    if not 0 < max_prompt_length < max_length:
        raise InputError(
            f"--max-prompt-length ({max_prompt_length}) must be at least 1 and below --max-length ({max_length}),"
            " so that every response has room"
        )


@dataclass(frozen=True)
class OverTheLimit:
    """Prompts that are too long: their lines, of how many samples, and the tokens of the longest."""

    lines: tuple[int, ...]
    samples: int
    longest: int
    unit: str = "line"

    def error(self, name: str, max_prompt_length: int, rule: Rule) -> InputError:
        """The error that says which they are, and what to do."""
        over = f"{name}: {len(self.lines)} of {self.samples} prompts are over --max-prompt-length {max_prompt_length}"
        where, more = some_lines(self.lines, self.unit), "Raise --max-prompt-length and --max-length"
        skip = "pass --long-prompts skip to leave these samples out"
        if rule == "truncate-left":
            return InputError(
                f"{over} tokens even with one sign left of their question ({where}): their system message and tools,"
                f" and what the template writes, are too long. {more}, or {skip}"
            )
        shorten = ", or --long-prompts truncate-left to shorten them" if rule == "error" else ""
        return InputError(f"{over} tokens ({where}; the longest has {self.longest}). {more}, or {skip}{shorten}")


def nothing_trained(name: str, lines: Sequence[int], unit: str = "line") -> InputError:
    """The error where --reasoning only leaves no sample."""
    return InputError(
        f"{name}: --reasoning only trains on reasoning alone, and no answer has any that is in the prompt's format"
        f' ({some_lines(lines, unit)}). Records have it in "reasoning_content", or as <think>...</think> in the answer;'
        " take a chat template that writes it, or --reasoning keep"
    )


def _responses(count: int) -> str:
    return "1 response" if count == 1 else f"{count} responses"
