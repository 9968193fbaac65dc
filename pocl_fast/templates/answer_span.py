"""Where an answer starts and ends in the text that a chat template writes: learned from what the template writes around
other answers.

Knows texts and templates. Does not know token ids (encoding.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from pocl_fast.templates.chat_template import ChatTemplate, TemplateRefusal

PROBE = "Qz7answer7zQ"  # stands for an answer; no template changes it, no text has it
_USER = {"role": "user", "content": "Qz5question5zQ"}
_OPENED = re.compile(r"(?P<left>[<\[◁])(?P<name>\w+)(?P<right>[>\]▷])(?P<blank>\s*)$")  # at the end of a prompt
_CLOSED = re.compile(r"[<\[◁]/\w+[>\]▷]\s*$")
_REASONING = re.compile(r"think|thought|reason", re.IGNORECASE)
REASONING_TAGS = ("<think>", "</think>")  # of models whose template does not show theirs


class Turn(NamedTuple):
    """Where an earlier answer is in a conversation's text, in characters; where `ended`, with its end of turn."""

    start: int
    end: int
    ended: bool
    place: int  # among the conversation's messages


@dataclass(frozen=True)
class Split:
    """A conversation's text in two: `prompt`, which the model is given, and `answer`, which it is to say. `ended` says
    whether the answer's last token is the end of turn that the template writes. `earlier` answers in the prompt are
    trained on too."""

    prompt: str
    answer: str
    ended: bool
    earlier: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What a template writes around an answer."""

    header: str = ""  # what a prompt ends with for being one
    opening: str = ""  # between the prompt and the answer
    tail: str = ""  # behind the answer, to the end of the text
    end: str = ""  # the part of the tail that ends the turn
    leaves_out: bool = False  # no answer is written
    header_unasked: bool = False  # the template does not look at add_generation_prompt
    reasoning: tuple[tuple[str, str], ...] = (REASONING_TAGS,)  # what opens and closes it; "": the prompt opens it


@dataclass(frozen=True)
class AnswerFinder:
    """Splits conversations before the answer and behind the end of its turn.

    The prompt is what the template writes with `add_generation_prompt`, so that a model is asked as it was trained. Of
    a template that ignores this argument the header of the assistant's turn is the prompt's all the same. Where the
    template writes another opening of a finished answer than of an asked one, the asked one is taken, and a block of
    reasoning that it opens is closed before an answer without reasoning. A turn ends with what the template writes
    behind the answer whatever follows: what closes the whole text or opens the next turn does not belong to it.
    """

    template: ChatTemplate
    special: Collection[str] = ()  # the tokenizer's added tokens, special or not
    _ends: dict[str, str] = field(default_factory=dict)  # of each tail that was seen: what of it ends the turn

    @cached_property
    def shape(self) -> Shape:
        """What the template writes around the answer to a plain question; what it refuses shows nothing."""
        return self._learned()

    def split(self, messages: Sequence[Any], tools: Sequence[Any], answer: Any) -> Split:
        """The conversation with this last turn, in two. Raises `TemplateRefusal` where the template renders it not, or
        without the answer."""
        asked = self.template.messages(messages)
        turns = [*asked, answer]
        whole = self.template.render(turns, tools, prompt=False)
        prompt = self.template.render(asked, tools, prompt=True)
        shape = self.shape
        start, end = self._place(whole, asked, tools, answer)
        continues = whole.startswith(prompt)
        says = isinstance(answer.get("content"), str) and answer["content"].strip()
        if start is None and (not continues or (says and end is None)):
            every = "every answer" if shape.leaves_out else "the answer"
            raise TemplateRefusal(
                f"the chat template leaves {every} out, or rewrites it", "the template leaves the answer out"
            )
        first = len(prompt) if start is None else start
        if shape.header_unasked and start is not None and not (continues and whole[len(prompt) : start].isspace()):
            prompt, continues = whole[:start], True
        elif continues:
            first = len(prompt)
        elif shape.opening and prompt.endswith(shape.header) and whole.endswith(shape.header + shape.opening, 0, first):
            first -= len(shape.opening)  # turns before this one are other text where it is not asked for
        ended, upto = self._turn_end(whole, end, first, turns, tools)
        marks = [(start, to) for start, to in self.template.marked(turns, tools) if continues and first < to]
        if marks:
            first, marked_to = max(first, marks[0][0]), marks[-1][1]
            prompt = whole[:first]
            ends = {shape.end.strip(), "" if end is None else whole[end:upto].strip()}
            if marked_to < upto and whole[marked_to:upto].strip() not in ends:  # an answer must end, marked or not
                ended, upto = False, marked_to
        split = _balanced(Split(prompt, whole[first:upto], ended), answer, continues)
        if not says and not any(name in split.answer for name in called_names(answer)):
            raise TemplateRefusal(
                "the chat template does not write tool calls, which are all that the answer has",
                "tool calls are not shown",
            )
        return split

    # -- where the answer is ------------------------------------------------------------------------------------------

    def _place(
        self, whole: str, asked: Sequence[Any], tools: Sequence[Any], answer: Any
    ) -> tuple[int | None, int | None]:
        """Where the answer's own text starts and ends in the whole, each None where that is not known."""
        content = answer.get("content")
        content = content if isinstance(content, str) else ""
        tail = self.shape.tail
        if content and not content[0].isspace() and whole.endswith(content + tail):  # as most are
            end = len(whole) - len(tail)
            return end - len(content), end
        texts = [content, content.strip(), content.rpartition(self._closing_tag(content))[2].strip()]
        if whole.endswith(tail):
            end = len(whole) - len(tail)
            for text in filter(None, texts):
                if whole.endswith(text, 0, end):
                    return self._behind_header(whole, end - len(text), asked, tools, text), end
        before, behind = self._around(asked, tools)  # rewritten, or in a conversation with another end
        if behind is not None and whole.endswith(behind) and len(behind) < len(whole):
            end = len(whole) - len(behind)
            start = common_length(whole[:end], before)
            return (start if start < end else None), end
        for text in filter(None, texts):
            if (found := whole.rfind(text)) >= 0 and found >= common_length(whole, before) - len(text):
                return found, found + len(text)
        shared = common_length(whole, before)
        return (shared if behind is not None and shared == len(before) else None), None

    def _behind_header(self, whole: str, start: int, asked: Sequence[Any], tools: Sequence[Any], text: str) -> int:
        """Where a text that was found at `start` begins: blanks that it begins with may be the header's, written
        before an answer that was stripped."""
        if not text[0].isspace():
            return start
        before, _ = self._around(asked, tools)
        blanks = len(text) - len(text.lstrip())
        return max(start, min(len(before), start + blanks)) if whole.startswith(before) else start

    def _around(self, asked: Sequence[Any], tools: Sequence[Any]) -> tuple[str, str | None]:
        """What the template writes before and behind a plain answer in this conversation."""
        try:
            text = self.template.render([*asked, {"role": "assistant", "content": PROBE}], tools, prompt=False)
        except TemplateRefusal:
            return "", None
        before, found, behind = text.rpartition(PROBE)
        return before, behind if found else None

    def _closing_tag(self, content: str) -> str:
        tags = [closing for _, closing in self.shape.reasoning if closing in content]
        return tags[0] if tags else "\0"

    # -- where its turn ends ------------------------------------------------------------------------------------------

    def _turn_end(
        self, whole: str, end: int | None, first: int, turns: Sequence[Any], tools: Sequence[Any]
    ) -> tuple[bool, int]:
        """Whether the template ends the turn, and where in the text. `end` is where the answer's own text ends; where
        that is not known the text from `first` on is looked at."""
        place = first if end is None else end
        tail = whole[place:]
        if end is None or tail not in self._ends:
            found = self._learn_end(whole, place, turns, tools)
            if end is None:
                return bool(found), place + len(found)
            if len(self._ends) < 100:  # a template has few; more are texts that it writes behind an answer
                self._ends[tail] = found
            return bool(found), place + len(found)
        return bool(self._ends[tail]), place + len(self._ends[tail])

    def _learn_end(self, whole: str, place: int, turns: Sequence[Any], tools: Sequence[Any]) -> str:
        """The part of the text behind `place` that ends the turn: what the template writes there whatever follows."""
        tail = whole[place:]
        if not tail.strip():
            return ""
        asked_on = self._continued(whole[:place], turns, tools, prompt=True)
        followed = self._continued(whole[:place], [*turns, _USER], tools, prompt=False)
        before_question = tail if followed is None else self._shared(tail, followed)
        if asked_on is not None and asked_on != tail:
            shared = self._shared(tail, asked_on)
            if (both := self._shared(shared, before_question)).strip():
                shared = both
        else:  # the template writes the same when it is asked for the next answer, so perhaps its header
            shared = self._without_opener(before_question, whole)
        if not shared.strip():  # nothing in common: an end of the last turn alone, or the header of the next one
            shared = "" if self._is_header(whole, tail) else tail
        return shared.rstrip()

    def _continued(self, head: str, turns: Sequence[Any], tools: Sequence[Any], *, prompt: bool) -> str | None:
        """What the template writes behind `head` of a conversation that goes on; None where it writes another head."""
        try:
            text = self.template.render(turns, tools, prompt=prompt)
        except TemplateRefusal:
            return None
        if text.startswith(head):
            return text[len(head) :]
        return text[found + len(PROBE) :] if (found := text.rfind(PROBE)) >= 0 else None

    def _is_header(self, whole: str, tail: str) -> bool:
        """Whether the tail opens an answer: the prompt of this answer ends with it as well."""
        before, found, _ = whole.rpartition(PROBE)
        return bool(found) and before.rstrip().endswith(tail.strip())

    def _shared(self, one: str, other: str) -> str:
        """The text that both begin with, up to a boundary of tokens or words."""
        pairs = zip(self._units(one), self._units(other), strict=False)
        return "".join(unit for unit, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _without_opener(self, shared: str, whole: str) -> str:
        """Without what opens a turn at its end: the text's own beginning."""
        units, beginning = self._units(shared), self._units(whole)
        beginnings = (beginning, beginning[1:])  # with the token that begins every text, or without one
        for cut in range(1, len(units)):
            kept = "".join(units[:cut])
            if kept.strip() and any(units[cut:] == start[: len(units) - cut] for start in beginnings):
                return kept
        return shared

    def _units(self, text: str) -> list[str]:
        """Added tokens, words in brackets, words, blanks and single signs."""
        special = "".join(re.escape(token) + "|" for token in sorted(self.special, key=len, reverse=True) if token)
        return re.findall(special + r"<[^<>\s]+>|\[[^\[\]\s]+\]|\w+|\s+|.", text)

    # -- what a template writes of itself -----------------------------------------------------------------------------

    def _learned(self) -> Shape:
        leaves_out = False
        for asked in ([_USER], [{"role": "system", "content": "Qz3system3zQ"}, _USER]):
            messages = self.template.messages(asked)
            turns = [*messages, {"role": "assistant", "content": PROBE}]
            try:
                whole = self.template.render(turns, prompt=False)
                prompt, bare = (self.template.render(messages, prompt=asks) for asks in (True, False))
            except TemplateRefusal:
                continue
            before, found, tail = whole.rpartition(PROBE)
            leaves_out = not found
            if not found:
                continue
            opening = before[len(prompt) :] if before.startswith(prompt) and prompt != bare else ""
            end = self._ends[tail] = self._learn_end(whole, len(before) + len(PROBE), turns, ())
            header_unasked = prompt == bare
            asked_text = before if header_unasked else prompt
            tags = self._reasoning(messages, asked_text, opening)
            opened = _reasoning_opened_by(asked_text, continues=before.startswith(asked_text))
            if opened and (closing := _closing(opened)) != end:
                tags.append(("", closing))
            reasoning = tuple(dict.fromkeys(tag for tag in tags if tag[1]))
            header = prompt[len(bare) :] if prompt.startswith(bare) else ""
            return Shape(header, opening, tail, end, header_unasked=header_unasked, reasoning=reasoning)
        return Shape(leaves_out=leaves_out)

    def _reasoning(self, messages: Sequence[Any], prompt: str, opening: str) -> list[tuple[str, str]]:
        """What opens and closes reasoning: as the template writes it, as it leaves it empty."""
        tags = [REASONING_TAGS]
        thought = "Qz9thought9zQ"
        turn = {"role": "assistant", "content": PROBE, "reasoning_content": thought}
        try:
            written = self.template.render([*messages, turn], prompt=False)
        except TemplateRefusal:
            written = ""
        head, found, behind = written.rpartition(thought)
        if found and PROBE in behind:
            shared = common_length(head, prompt.rstrip())
            tags.append((head[shared:].strip(), behind[: behind.index(PROBE)].strip()))
        if len(words := opening.split()) == 2 and words[0] != words[1]:
            tags.append((words[0], words[1]))
        return tags


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def tags_at_end(prompt: str) -> list[str]:
    """The tag that a prompt ends with, and the one that closes it."""
    opened, closed = _OPENED.search(prompt), _CLOSED.search(prompt)
    return ([opened.group().strip(), _closing(opened)] if opened else []) + ([closed.group().strip()] if closed else [])


def called_names(answer: Any) -> list[str]:
    """The names of the functions that a turn calls."""
    calls = answer.get("tool_calls") or ()
    return [str((call.get("function") or call).get("name", "")) for call in calls if isinstance(call, dict)]


def _closing(opened: re.Match[str]) -> str:
    return f"{opened['left']}/{opened['name']}{opened['right']}"


def _reasoning_opened_by(prompt: str, *, continues: bool) -> re.Match[str] | None:
    """The <name> at the prompt's end that opens a block of reasoning. It does where the template's finished answers do
    not continue that prompt, or where the name says so; another, such as <assistant>, is a header."""
    opened = _OPENED.search(prompt)
    return None if opened is None or (continues and not _REASONING.search(opened["name"])) else opened


def _balanced(split: Split, answer: Any, continues: bool) -> Split:
    """The split with each block of reasoning that the prompt opens closed in the answer, once."""
    closed = _CLOSED.search(split.prompt)
    if closed and not continues and (block := split.answer.partition(closed.group().strip()))[1]:
        return Split(split.prompt, block[2].lstrip(), split.ended)  # the prompt has the block already, an empty one
    opened = _reasoning_opened_by(split.prompt, continues=continues)
    if opened is None:
        return split
    tag, closing = opened.group().strip(), _closing(opened)
    said = split.answer
    content, reasoning = answer.get("content") or "", answer.get("reasoning_content")
    if not continues and closing not in said:
        if isinstance(reasoning, str) and reasoning.strip():
            said = f"{reasoning.strip()}\n{closing}\n\n{said}"
        elif isinstance(content, str) and closing in content:  # the template wrote the part behind it alone
            thought = content.partition(closing)[0].strip().removeprefix(tag).strip()
            said = f"{thought}\n{closing}\n\n{said.lstrip()}"
    if said.lstrip().startswith(tag):  # the answer opens it again
        said = said.lstrip().removeprefix(tag).lstrip()
    if closing not in said:
        blank = "" if "\n" in opened["blank"] else "\n\n"  # a second line end would become one token with the prompt's
        said = f"{blank}{closing}\n\n{said}"
    return Split(split.prompt, said, split.ended)
