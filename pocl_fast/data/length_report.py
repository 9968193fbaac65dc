"""What the length limits and the options took from a data set, in words.

Knows counts and line numbers. Does not know samples nor tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_fast.data import unused_fields
from pocl_fast.data.answer_choice import Notes, described
from pocl_fast.system.errors import InputError


@dataclass(frozen=True)
class LengthReport:
    """What the length limits did to a data set; `skipped` and `truncated` hold line numbers."""

    samples: int
    skipped: tuple[int, ...]
    truncated: tuple[int, ...]
    unused: tuple[tuple[str, int], ...] = ()  # fields that no model is told, and how many records have them
    unwritten: tuple[tuple[str, tuple[int, ...]], ...] = ()  # what the template left out, and of which lines
    untrained: tuple[int, ...] = ()  # lines of samples that were left out, for nothing in them is trained on
    notes: Notes = ()  # what else was decided about answers

    def describe(self, name: str) -> str:
        parts = [f"{name}: {self.samples} samples"]
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped for a prompt over the limit ({_some_lines(self.skipped)})")
        if self.truncated:
            parts.append(f"{_responses(len(self.truncated))} cut to the length limit ({_some_lines(self.truncated)})")
        if self.untrained:
            parts.append(f"{len(self.untrained)} left out: no answer has reasoning ({_some_lines(self.untrained)})")
        parts += described(self.notes, _some_lines)
        if self.unused:
            parts.append(unused_fields.describe(self.unused))
        for what, lines in self.unwritten:
            purpose = ", as many templates do on purpose" if what == unused_fields.EARLIER_REASONING else ""
            parts.append(f"the template does not write the {what} of {len(lines)} ({_some_lines(lines)}){purpose}")
        return "; ".join(parts)


def check_limits(max_length: int, max_prompt_length: int) -> None:
    """Raises `InputError` where a longest prompt would leave no room for a response."""
    if not 0 < max_prompt_length < max_length:
        raise InputError(
            f"--max-prompt-length ({max_prompt_length}) must be at least 1 and below --max-length ({max_length}),"
            " so that every response has room"
        )


def over_the_limit(name: str, lines: Sequence[int], samples: int, longest: int, max_prompt_length: int) -> InputError:
    """The error that says which prompts are over the limit, and what to do."""
    return InputError(
        f"{name}: {len(lines)} of {samples} prompts are over --max-prompt-length {max_prompt_length} tokens"
        f" ({_some_lines(lines)}; the longest has {longest}). Raise --max-prompt-length and --max-length,"
        " or pass --long-prompts skip to leave these samples out"
    )


def nothing_trained(name: str, lines: Sequence[int]) -> InputError:
    """The error where --reasoning only leaves no sample."""
    return InputError(
        f"{name}: --reasoning only trains on reasoning alone, and no answer has any that is in the prompt's format"
        f' ({_some_lines(lines)}). Records have it in "reasoning_content", or as <think>...</think> in the answer; take'
        " a chat template that writes it, or --reasoning keep"
    )


def _responses(count: int) -> str:
    return "1 response" if count == 1 else f"{count} responses"


def _some_lines(lines: Sequence[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:5])
    return f"line{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 5 else ''}"
