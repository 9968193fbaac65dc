"""Where the earlier answers of a conversation are in the text that a chat template writes of it.

Knows texts, templates and the turns of a conversation. Does not know token ids (encoding.py), nor how a template's last
answer is found (answer_span.py), which it asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from pocl_fast.templates.answer_span import PROBE, AnswerFinder, Split, Turn
from pocl_fast.templates.chat_template import TemplateRefusal
from pocl_fast.templates.decisions import Decision
from pocl_fast.templates.reasoning import reasoning_in, thoughts_of

Place: TypeAlias = tuple[int, int]  # from, to, in characters


UNREASONED = Decision(
    "earlier answers not trained on, because the template leaves their reasoning out",
    advice="--reasoning strip trains on them without it",
)
LOST = Decision("earlier answers not trained on, because it is not clear where in the template's text they are")


class Found(NamedTuple):
    """The earlier answers of a conversation that can be trained on, and how many cannot, by why."""

    turns: tuple[Turn, ...]
    left: tuple[tuple[Decision, int], ...] = ()


@dataclass(frozen=True)
class TurnFinder:
    """Finds each earlier answer from behind the header that a model is asked with to its end of turn.

    The text is compared with what the template writes of the same turns with other words in them. Where it is that
    text with the contents put back, all places follow at once. Where it is not, a turn is looked for as the last one of
    its own conversation. An end of turn that the template writes behind earlier answers alone is not taken: a model
    that learns it would end its answers otherwise than it is asked to.
    """

    finder: AnswerFinder
    _skeletons: dict[tuple[str, ...], _Skeleton | None] = field(default_factory=dict)  # of plain turns, by their roles
    _behind_calls: dict[str, tuple[str, str]] = field(default_factory=dict)  # next role: how calls end, what follows

    def find(
        self, split: Split, messages: Sequence[Any], tools: Sequence[Any], answer: Any, wanted: Iterable[int]
    ) -> Found:
        """Where the `wanted` ones of the messages are in the split's prompt. `messages` are those before the answer, as
        the template is given them."""
        talk = _Talk(self.finder, split, messages, tools, self._contents(split.prompt, messages, tools))
        marks = self._marks(split.prompt, messages, tools, answer)
        turns: list[Turn] = []
        unreasoned = lost = 0
        for place in wanted:
            turn = self._turn(talk, place)
            if turn is None or turn.start < (turns[-1].end if turns else 1):
                lost += 1
                continue
            turn = self._within_marks(turn, split.prompt, marks)
            said = split.prompt[turn.start : turn.end]
            if any(thought not in said for thought in thoughts_of(messages[place], self.finder.shape.reasoning)):
                unreasoned += 1
            else:
                turns.append(turn)
        return Found(tuple(turns), ((UNREASONED, unreasoned), (LOST, lost)))

    # -- a turn -------------------------------------------------------------------------------------------------------

    def _turn(self, talk: _Talk, place: int) -> Turn | None:
        start = self._start(talk, place)
        if start is None:
            return self._as_last(talk, place)
        if talk.messages[place].get("tool_calls"):
            return self._calling(talk, place, start)
        if place not in talk.contents or not self.finder.shape.tail:
            return self._as_last(talk, place, start)
        _, end = talk.contents[place]
        closing = self.finder.shape.end
        ended = bool(closing) and talk.text.startswith(closing, end)
        return Turn(start, end + len(closing) if ended else end, ended, place)

    def _start(self, talk: _Talk, place: int) -> int | None:
        """Behind the header that a model is asked with; None where the text has another one."""
        header = talk.header(place)
        if header is None:
            return None
        behind = talk.contents[place - 1][1]
        if talk.text.startswith(header, behind):
            return behind + len(header)
        unopened = self._without_block(header)  # only an asked answer has the block, or another one than this
        if place not in talk.contents:
            if unopened == header or not talk.text.startswith(unopened, behind):
                return None
            return self._behind_block(talk.text, behind + len(unopened))
        start = talk.contents[place][0]
        written = talk.text[behind:start]
        if unopened != header and self._without_block(written) == unopened:
            return start
        shape = self.finder.shape  # or what ends the text stands before the header of an asked answer alone
        _, found, opening = written.rpartition(shape.header) if shape.header.strip() else ("", "", "")
        return start - len(opening) if found and opening in ("", shape.opening) else None

    def _without_block(self, text: str) -> str:
        """A text without a block of reasoning that it ends with, opened or empty."""
        for opens, closes in self.finder.shape.reasoning:
            before, found, behind = text.rpartition(opens or closes.replace("/", "", 1))
            if found and behind.strip() in ("", closes):
                return before
        return text

    def _behind_block(self, text: str, start: int) -> int:
        """Behind an empty block of reasoning that begins there."""
        for opens, closes in self.finder.shape.reasoning:
            opened = opens or closes.replace("/", "", 1)
            within, found, _ = text[start:].partition(closes)
            if found and within.strip() == opened:
                return start + len(within) + len(closes)
        return start

    def _calling(self, talk: _Talk, place: int, start: int) -> Turn | None:
        """A turn that calls tools, whose text only the template knows: up to what it writes between such a turn and the
        next one."""
        following = talk.contents.get(place + 1)
        role = talk.messages[place + 1]["role"] if place + 1 < len(talk.messages) else ""
        if following and (known := self._behind_calls.get(role)):
            ends, between = known
            end = following[0] - len(between)
            if talk.text.startswith(between, end) and talk.text.endswith(ends, start, end):
                return Turn(start, end, True, place)
        turn = self._as_last(talk, place, start)
        if turn is not None and turn.ended and following and turn.end <= following[0]:
            said = talk.text[turn.start : turn.end]
            ends = next((token for token in self.finder.special if said.endswith(token)), said[-1:])
            self._behind_calls[role] = ends, talk.text[turn.end : following[0]]
        return turn

    def _as_last(self, talk: _Talk, place: int, start: int | None = None) -> Turn | None:
        """The turn as the last one of its own conversation, where the text begins with that one; or where the text has
        its answer at this `start`."""
        try:
            alone = self.finder.split(talk.messages[:place], talk.tools, talk.messages[place])
        except TemplateRefusal:
            return None
        if talk.text.startswith(alone.prompt):
            start = len(alone.prompt)
        if start is None:
            return None
        shape = self.finder.shape
        forms = [alone.answer, alone.answer.removeprefix(shape.opening), *self._unreasoned(alone.answer)]
        for said in forms:
            if talk.text.startswith(said, start):
                return Turn(start, start + len(said), alone.ended, place)
        for said in forms:
            bare = said.removesuffix(shape.end) if shape.end else said
            if talk.text.startswith(bare, start):
                return Turn(start, start + len(bare), False, place)
        return None

    def _unreasoned(self, answer: str) -> Iterable[str]:
        """An answer without the empty block of reasoning that it begins with, or the end of one."""
        for opens, closes in self.finder.shape.reasoning:
            rest = answer.lstrip().removeprefix(opens or closes.replace("/", "", 1)).lstrip()
            if rest.startswith(closes):
                said = rest.removeprefix(closes)
                yield from (said, said.removeprefix("\n\n"), said.removeprefix("\n"), said.lstrip())

    def _within_marks(self, turn: Turn, text: str, marks: Sequence[Place]) -> Turn:
        """The turn as far as the template's marks say that the model writes it; its end of turn is the model's."""
        inside = [(start, end) for start, end in marks if start < turn.end and turn.start < end]
        if not inside:
            return turn
        start, end = max(turn.start, inside[0][0]), inside[-1][1]
        if end < turn.end and text[end : turn.end].strip() != self.finder.shape.end.strip():
            return Turn(start, end, False, turn.place)
        return turn._replace(start=start)

    def _marks(self, text: str, messages: Sequence[Any], tools: Sequence[Any], answer: Any) -> Sequence[Place]:
        """The template's marks in the text of a prompt, which may be other text before an answer than before none."""
        template = self.finder.template
        if not (marks := template.marked([*messages, answer], tools)):
            return marks
        if text.startswith(template.render(messages, tools, prompt=True)):
            return template.marked(messages, tools, prompt=True)
        return marks

    # -- the contents of all turns ------------------------------------------------------------------------------------

    def _contents(self, text: str, messages: Sequence[Any], tools: Sequence[Any]) -> dict[int, Place]:
        """Where the contents of the messages are in the text; none where it is not clear."""
        tags = self.finder.shape.reasoning
        heads = [reasoning_in(message, tags) for message in messages]
        plain = not tools and not any(heads) and all(len(message) == 2 for message in messages)
        roles = tuple(message["role"] for message in messages)
        if plain and roles in self._skeletons:
            skeleton = self._skeletons[roles]
        else:
            skeleton = self._skeleton(messages, tools, heads)
            if plain and len(self._skeletons) < 10_000:
                self._skeletons[roles] = skeleton
        return {} if skeleton is None else skeleton.places(text, messages, heads)

    def _skeleton(self, messages: Sequence[Any], tools: Sequence[Any], heads: Sequence[str]) -> _Skeleton | None:
        """What the template writes around the contents. Turns that call tools stay as they are."""
        probes = {i: PROBE.replace("7", f"7n{i}n") for i, one in enumerate(messages) if not one.get("tool_calls")}
        others = [{**one, "content": heads[i] + probes[i]} if i in probes else one for i, one in enumerate(messages)]
        try:
            text = self.finder.template.render(others, tools, prompt=True)
        except TemplateRefusal:
            return None
        pieces, behind = [], 0
        for place, probe in probes.items():
            found = text.find(probe, behind)
            if found < 0:
                continue  # a turn that the template leaves out
            pieces.append((place, text[behind:found]))
            behind = found + len(probe)
        return _Skeleton(tuple(pieces), text[behind:])


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes before the content of each turn, and behind the last."""

    pieces: tuple[tuple[int, str], ...]
    tail: str

    def places(self, text: str, messages: Sequence[Any], heads: Sequence[str]) -> dict[int, Place]:
        """Where the contents are in a text that is made so; none where it is not."""
        found: dict[int, Place] = {}
        behind = 0
        followed = [*(piece for _, piece in self.pieces[1:]), None]
        for (place, piece), following in zip(self.pieces, followed, strict=False):  # none where no content was found
            start = behind + len(piece)
            if not text.startswith(piece, behind):
                return {}
            forms = _forms(messages[place].get("content") or "", heads[place])
            ends = (start + len(form) for form in forms if text.startswith(form, start))
            if following is None:
                all_ends = list(ends)
                behind = next((end for end in all_ends if text[end:] == self.tail), all_ends[0] if all_ends else -1)
            else:
                behind = next((end for end in ends if text.startswith(following, end)), -1)
            if behind < 0:
                return {}
            found[place] = (start, behind)
        return found


@dataclass(frozen=True)
class _Talk:
    """A conversation and its text."""

    finder: AnswerFinder
    split: Split
    messages: Sequence[Any]
    tools: Sequence[Any]
    contents: Mapping[int, Place]  # of the messages, where they are known
    _headers: dict[str, str | None] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.split.prompt

    def header(self, place: int) -> str | None:
        """What a model is asked with behind the content of the turn before; None where that is not known."""
        if place - 1 not in self.contents:
            return None
        last = len(self.messages) - 1
        role = self.messages[place - 1]["role"]
        if role == self.messages[last]["role"] and last in self.contents:
            return self.text[self.contents[last][1] :]
        if role not in self._headers:
            self._headers[role] = self._asked(place)
        return self._headers[role]

    def _asked(self, place: int) -> str | None:
        probe = {"role": "assistant", "content": PROBE}
        try:
            prompt = self.finder.split(self.messages[:place], self.tools, probe).prompt
        except TemplateRefusal:
            return None
        behind = self.contents[place - 1][1]
        if prompt[:behind] == self.text[:behind]:
            return prompt[behind:]
        said = PROBE.replace("7", "7n")  # the text before is another, such as that of the tools
        try:
            turns = [*self.messages[: place - 1], {**self.messages[place - 1], "content": said}]
            prompt = self.finder.split(turns, self.tools, probe).prompt
        except TemplateRefusal:
            return None
        _, found, header = prompt.rpartition(said)
        return header if found else None


def _forms(content: str, head: str) -> Iterable[str]:
    """The ways in which templates write a content, without its `head`."""
    said = content[len(head) :]
    yield said
    yield said.strip()
    yield said.lstrip()
    yield said.rstrip()
    yield said.lstrip("\n")
    yield said.strip("\n")
    yield json.dumps(said)[1:-1]
    yield json.dumps(said, ensure_ascii=False)[1:-1]
