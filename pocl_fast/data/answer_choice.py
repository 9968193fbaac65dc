"""Which answers of a sample are trained on, and how far each: the options `train_on` and `reasoning`.

Knows samples and the texts and tokens that became of them. Does not know how texts become tokens (encoding.py), nor
where in a text an answer is (answer_span.py, turn_spans.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.messages import Message
from pocl_fast.records.samples import Sample
from pocl_fast.templates.answer_span import Split
from pocl_fast.templates.decisions import Decision, Note, Notes
from pocl_fast.templates.reasoning import Reasoning, Tags, closed_in, is_empty, stripped

TrainOn = Literal["last", "all"]
Span: TypeAlias = tuple[int, int]  # from, to
STRIPPED = Decision("answers from which reasoning was taken out")
NO_REASONING = Decision("answers without reasoning, which are not trained on")
ENDS_EARLIER = Decision("answers left out so", records="conversations that end earlier for --max-length")


class ChoiceOptions(Protocol):
    """Which answers are trained on: a run's options, a trainer's arguments."""

    @property
    def train_on(self) -> Any: ...
    @property
    def reasoning(self) -> Any: ...
    @property
    def data_source(self) -> Any: ...


class Turns(NamedTuple):
    """A conversation's tokens up to its last answer and from there on, and which of them are trained on."""

    prompt: list[int]
    response: list[int]
    trained: list[tuple[int, Span]]  # the answer's place among the messages, its tokens

    def spans(self, max_length: int) -> tuple[Span, ...]:
        """What is trained on of so many tokens; empty where that is the response alone, as far as it goes."""
        ends = len(self.prompt) + len(self.response)
        found = tuple((start, min(end, max_length)) for _, (start, end) in self.trained if start < max_length)
        return () if found == ((len(self.prompt), min(ends, max_length)),) else found


class AnswerChoice:
    """Chooses the answers of samples, and notes what is not trained on."""

    def __init__(self, tokenizer: Any, tags: Tags, train_on: TrainOn, reasoning: Reasoning):
        """`tags` are around reasoning."""
        self._tokenizer, self._tags = tokenizer, tags
        self.train_on, self._reasoning = train_on, reasoning
        self._noted: dict[Decision, dict[int, int]] = {}  # what was decided -> how many answers, by line

    def note(self, what: Decision, line: int, count: int) -> None:
        """Keeps what was decided about so many answers of a record, in place of what it was before."""
        if count:
            self._noted.setdefault(what, {})[line] = count
        elif what in self._noted:
            self._noted[what].pop(line, None)

    def forget(self, line: int) -> None:
        """Drops what was decided of a record."""
        for lines in self._noted.values():
            lines.pop(line, None)

    def take_notes(self) -> Notes:
        """What was decided since the last call."""
        taken = (Note(what, sum(lines.values()), tuple(sorted(lines))) for what, lines in self._noted.items() if lines)
        ordered = tuple(sorted(taken, key=lambda note: (note.lines[0], note.decision)))  # however they came together
        self._noted.clear()
        return ordered

    def prepared(self, sample: Sample, where: str) -> Sample:
        """The sample without reasoning where that is to be taken out. Raises `BadRecord` where nothing else is said."""
        if self._reasoning != "strip" or (made := stripped(sample, self._tags)) is sample:
            return sample
        before, after = ((*one.messages, one.answer_turn) for one in (sample, made))
        if any(turn["role"] == "assistant" and is_empty(turn) for turn in after):
            raise BadRecord(
                f"{where}: an answer is nothing but reasoning, and --reasoning strip leaves nothing of it: leave this"
                " record out",
                "nothing but reasoning",
            )
        self.note(STRIPPED, sample.line, sum(one != other for one, other in zip(before, after, strict=True)))
        return made

    def turns(
        self, sample: Sample, split: Split, tokens: Sequence[list[int]], read: Callable[[str], str] = str
    ) -> Turns:
        """What is trained on of a sample whose texts (`texts_of`) have these tokens. `read` gives such a text as the
        tokens say it."""
        if not split.earlier and self._reasoning != "only":
            before, response = tokens
            return Turns(before, response, [(len(sample.messages), (len(before), len(before) + len(response)))])
        places = [*(turn.place for turn in split.earlier), len(sample.messages)]
        ends = list(accumulate(map(len, tokens)))
        lengths: Iterable[int] = map(len, tokens[1::2])
        if self._reasoning == "only":
            turns = [*sample.messages, sample.answer_turn]
            each = zip(places, texts_of(split)[1::2], tokens[1::2], strict=True)
            lengths = (self._reasoning_length(turns[place], text, ids, read) for place, text, ids in each)
        each_start = zip(places, ends[::2], lengths, strict=True)
        trained = [(place, (start, start + length)) for place, start, length in each_start if length]
        self.note(NO_REASONING, sample.line, len(places) - len(trained))
        return Turns(list(chain(*tokens[:-1])), tokens[-1], trained)

    def _reasoning_length(self, turn: Message, text: str, ids: Sequence[int], read: Callable[[str], str]) -> int:
        """How many of an answer's tokens are its reasoning, with what closes it."""
        closed = closed_in(text, turn, self._tags)
        if closed is None:
            return 0
        lengths, closing = range(1, len(ids) + 1), read(closed.tag)

        def holds(length: int) -> bool:
            return self._tokenizer.decode(list(ids[:length])).count(closing) >= closed.times

        found = bisect_left(lengths, True, key=holds)
        return lengths[found] if found < len(lengths) else 0


def texts_of(split: Split) -> list[str]:
    """The conversation's text in parts: what stands before an answer that is trained on and the answer, by turns."""
    texts, place = [], 0
    for turn in split.earlier:
        texts += [split.prompt[place : turn.start], split.prompt[turn.start : turn.end]]
        place = turn.end
    return [*texts, split.prompt[place:], split.answer]
