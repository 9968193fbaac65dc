"""Prompts over the length limit: left out, or shortened from their beginning in a way that keeps the template whole.

Knows the turns of samples. Does not know how these become tokens (encoding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pocl_fast.records.samples import Sample

Rule = Literal["error", "skip", "truncate-left"]
_INSTRUCTIONS = frozenset({"system", "developer"})  # roles whose turns always stay
# A text that begins within a long word can have more tokens than one that begins before it: so many characters further
# back are tried too. Tokens of more characters than that are runs of blanks and of signs.
_BEYOND = 32


@dataclass(frozen=True)
class Shortened:
    """A sample whose prompt was shortened: which of its turns it lost, and whether a text lost its beginning."""

    sample: Sample
    lost: tuple[int, ...]  # places among the messages that it had
    cut: bool

    @property
    def turns(self) -> int:
        return len(self.lost)


@dataclass(frozen=True)
class Shortenings:
    """What was shortened in a data set: lines, and what these lost in all."""

    lines: tuple[int, ...] = ()
    turns: int = 0
    cut: int = 0  # questions, or what stands in their place

    def describe(self, lines: str) -> str:
        """In words; `lines` says where the prompts are."""
        lost = []
        if self.turns:
            lost.append("1 turn" if self.turns == 1 else f"{self.turns} turns")
        if self.cut:
            lost.append(f"the beginning of {self.cut} question{'s' if self.cut > 1 else ''}")
        prompts = "1 prompt" if len(self.lines) == 1 else f"{len(self.lines)} prompts"
        return f"{prompts} shortened to --max-prompt-length ({lines}): {' and '.join(lost)} dropped"


def shortened(
    sample: Sample, length: Callable[[Sample], int], limit: int, *, answer: int | None = None
) -> Shortened | None:
    """The sample with the least taken from its prompt's beginning so that `length` is at most `limit`; None where even
    one sign of its question is too much. `answer` is the place of the first answer that is trained on, without it the
    one behind all messages.

    The oldest turns go first, a question with its answers, a tool call with its results. System messages and tools
    stay, and so do the last question and the last results. Then a text loses its beginning, at a character's border:
    the results of tools that are answered, oldest first, then the question. Of a record with an input this goes first,
    and its instruction after it. An answer that is trained on never goes, nor does its question.
    """
    first = len(sample.messages) if answer is None else answer
    units = [unit for unit in _units(sample) if max(unit) < first]
    dropped = _fewest(sample, units, length, limit)
    lost = tuple(sorted(place for unit in units[:dropped] for place in unit))
    rest = _without(sample, lost)
    if length(rest) <= limit:
        return Shortened(rest, lost, cut=False)
    for text, put, optional in _texts(rest, first - len(lost)):
        offset = _first_fitting(text, lambda left, put=put: length(put(left)) <= limit)  # type: ignore[misc]
        if offset is not None:
            return Shortened(put(text[offset:]), lost, cut=True)
        if not optional:
            return None
        rest = put("")
        if length(rest) <= limit:
            return Shortened(rest, lost, cut=True)
    return None


# -- turns -------------------------------------------------------------------------------------------------------------


def _units(sample: Sample) -> list[list[int]]:
    """The places of turns that go together, oldest first, but for those that must stay."""
    exchanges: list[list[int]] = []
    before = ""
    for place, turn in enumerate(sample.messages):
        role = turn["role"]
        if role in _INSTRUCTIONS:
            continue
        if not exchanges or (role == "user" and before != "user"):
            exchanges.append([])
        exchanges[-1].append(place)
        before = role
    if not exchanges:
        return []
    *older, last = exchanges
    roles = [sample.messages[place]["role"] for place in last]
    asked = next((i for i, role in enumerate(roles) if role != "user"), len(roles))
    steps: list[list[int]] = []  # an answer of the last exchange with what follows it, such as a call and its results
    for place, role in zip(last[asked:], roles[asked:], strict=True):
        if role == "assistant" or not steps:
            steps.append([])
        steps[-1].append(place)
    return [*older, *([place] for place in last[: max(asked - 1, 0)]), *steps[:-1]]


def _fewest(sample: Sample, units: Sequence[Sequence[int]], length: Callable[[Sample], int], limit: int) -> int:
    """How many units must go so that the rest fits; all of them where it never does."""

    def fits(count: int) -> bool:
        return length(_without(sample, [place for unit in units[:count] for place in unit])) <= limit

    low, high = 0, len(units)  # not even `low` fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _without(sample: Sample, places: Sequence[int]) -> Sample:
    if not places:
        return sample
    kept = [place for place in range(len(sample.messages)) if place not in set(places)]
    moved = {old: new for new, old in enumerate(kept)}
    return replace(
        sample,
        messages=tuple(sample.messages[place] for place in kept),
        earlier=tuple(moved[place] for place in sample.earlier if place in moved),
    )


# -- texts -------------------------------------------------------------------------------------------------------------


def _texts(sample: Sample, end: int) -> Iterator[tuple[str, Callable[[str], Sample], bool]]:
    """The texts before the place `end` that may lose their beginning, in the order in which they do: each with what
    puts another in its place, and whether it may go altogether. What the texts before became is kept."""
    turns = list(sample.messages)
    asked = max((i for i in range(end) if turns[i]["role"] == "user"), default=-1)
    spoken = max((i for i in range(end) if turns[i]["role"] == "assistant"), default=-1)
    known = sample

    def said(place: int) -> Callable[[str], Sample]:
        def put(text: str) -> Sample:
            nonlocal known
            old = known.messages[place]
            messages = (*known.messages[:place], {**old, "content": text}, *known.messages[place + 1 :])
            instruction = text if known.instruction == old["content"] else known.instruction
            known = replace(known, messages=messages, instruction=instruction)  # type: ignore[arg-type]
            return known

        return put

    def given(text: str) -> Sample:
        nonlocal known
        whole = f"{known.instruction}\n\n{text}" if text else known.instruction
        known = replace(said(asked)(whole), input=text, instruction=sample.instruction)
        return known

    for place in range(max(asked, spoken) + 1, end):
        if turns[place]["role"] not in _INSTRUCTIONS and turns[place].get("content"):
            yield turns[place]["content"], said(place), True
    if asked < 0:
        return
    content = turns[asked]["content"]
    if sample.input and content == f"{sample.instruction}\n\n{sample.input}":
        yield sample.input, given, True
        content = sample.instruction
    yield content, said(asked), False


def _first_fitting(text: str, fits: Callable[[str], bool]) -> int | None:
    """Where the longest end of a text begins that fits, past its first character; None where none does that says
    something."""
    import regex  # transformers needs it: its \X is a character as people see it, such as a letter with its accents

    starts = [match.start() for match in regex.finditer(r"\X", text)][1:]
    while starts and not text[starts[-1] :].strip():
        starts.pop()
    if not starts:
        starts = [0] if text.strip() and fits(text) else []
    if not starts or not fits(text[starts[-1] :]):
        return None
    low, high = -1, len(starts) - 1  # `high` fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(text[starts[middle] :]) else (middle, high)
    further = range(max(0, high - _BEYOND), high)
    return starts[next((at for at in further if fits(text[starts[at] :])), high)]
