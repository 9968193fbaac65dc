"""What records say and no model is told: fields that are not read, and those that the prompt's template does not show.

Knows chat templates by what they read and what they print. Does not know how a prompt is made (encoding.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.forms import KNOWN, ONE_QUESTION, OPTIONAL
from pocl_fast.records.messages import Message
from pocl_fast.records.samples import BEHIND, Sample
from pocl_fast.system.typed_values import did_you_mean
from pocl_fast.templates import alpaca
from pocl_fast.templates.answer_span import REASONING_TAGS, Split, called_names
from pocl_fast.templates.chat_template import ChatTemplate, TemplateRefusal
from pocl_fast.templates.reasoning import FIELDS, Tags

MEANS_MORE = frozenset({"tools", "tool_calls"})  # without them the answer answers something else
EARLIER_REASONING = "reasoning in earlier turns"
_OTHER_TEXT = "another text"
_SHORT = 16  # a shorter text may be in a prompt by chance


class UnshownTurns:
    """Finds the turns before an answer that a template leaves out of the prompt, or ends before their end."""

    def __init__(self, chat: ChatTemplate, tags: Tags) -> None:
        """`tags` are those around reasoning."""
        self._chat, self._tags = chat, tags
        self._shown: set[tuple[tuple[str, ...], int]] = set()  # roles of a conversation, and the turn's place

    def places(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt: str) -> list[int]:
        """Which of the messages are not, or not to their end, in their prompt. System messages are not looked at, nor
        reasoning."""
        roles = tuple(message["role"] for message in messages)
        suspects, behind = [], 0
        for place, message in enumerate(messages):
            said = _said(message, self._tags)
            if not said or message["role"] in ("system", "developer"):
                continue
            found = prompt.find(said, behind)
            if found < 0 or (len(said) < _SHORT and (roles, place) not in self._shown):
                suspects.append(place)
            behind = max(behind, found + len(said)) if found >= 0 else behind
        return [place for place in suspects if not self._is_shown(messages, tools, roles, place)]

    def _is_shown(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], roles: tuple[str, ...], place: int
    ) -> bool:
        """Whether the template writes otherwise what this turn would say with more at its end."""
        turn = messages[place]
        longer = [*messages[:place], {**turn, "content": f"{turn['content']} {_OTHER_TEXT}"}, *messages[place + 1 :]]
        try:
            shown = self._chat.render(messages, tools, prompt=True) != self._chat.render(longer, tools, prompt=True)
        except TemplateRefusal:
            return True  # of the longer text alone: it is looked at, then
        if shown and len(self._shown) < 10_000:
            self._shown.add((roles, place))
        return shown


def unwritten(
    messages: Sequence[Any], tools: Sequence[Any], answer: Any, split: Split, tags: Tags = (REASONING_TAGS,)
) -> list[str]:
    """What a conversation has and the text that a template wrote of it has not, in words. `tags` are those around
    reasoning."""
    text = split.prompt + split.answer
    lost = []
    for message in messages:
        said = message.get("content")
        if message["role"] == "system" and isinstance(said, str) and said.strip() not in text:
            lost.append("system message")
    if tools and not any(_name(tool) in text for tool in tools):
        lost.append("tools")
    if any(name not in split.answer for name in called_names(answer)):
        lost.append("tool calls")
    said = _said(answer, tags)
    if answer.get("tool_calls") and not any(form in split.answer for form in (said, json.dumps(said)[1:-1])):
        lost.append("content beside tool calls")
    if any(thought not in split.answer for thought in _thoughts(answer, tags)):
        lost.append("reasoning")
    if any(thought not in split.prompt for turn in messages for thought in _thoughts(turn, tags)):
        lost.append(EARLIER_REASONING)
    return lost


def _said(turn: Any, tags: Tags) -> str:
    """What a turn says behind its reasoning."""
    content = turn.get("content")
    if not isinstance(content, str):
        return ""
    for _, closes in tags:
        content = content.rpartition(closes)[2]
    return content.strip()


def _thoughts(turn: Any, tags: Tags) -> list[str]:
    """A turn's reasoning, in fields of its own and in its content; an empty text is in every text."""
    if turn["role"] != "assistant":
        return []
    content = turn.get("content")
    inside = _inside(content, tags) if isinstance(content, str) else []
    if len(turn) == 2:
        return inside
    return [value.strip() for name in FIELDS if isinstance(value := turn.get(name), str)] + inside


def _inside(content: str, tags: Tags) -> list[str]:
    """The text before what closes reasoning."""
    found = ((opens, content.rpartition(closes)[0]) for opens, closes in tags if closes in content)
    return [text.strip().removeprefix(opens).strip() for opens, text in found]


def _name(tool: Any) -> str:
    """The name of a tool's or a call's function; text that is in every text where it has none."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return str(inner.get("name", "")) if isinstance(inner, dict) else ""


class Encoder(Protocol):
    """What is asked of a `SampleEncoder`."""

    @property
    def chat(self) -> ChatTemplate | None: ...


class UnusedFields:
    """Counts the fields of a data set that no model is told, as its samples pass by."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        """`name` stands for the data set in errors."""
        self._chat, self._alpaca, self._name = encoder.chat, encoder.chat is None, name
        self._shown: dict[str, bool] = {}  # of what was looked at so far, each once
        self._count: Counter[str] = Counter()

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """Field -> records that have it, in the order in which they were met."""
        return tuple(self._count.items())

    def see(self, sample: Sample) -> None:
        """Counts a sample's fields. Raises `BadRecord` with its line where the template has no place for what changes
        the question or the answer: turns, tools and their calls."""
        if sample.unused:
            self._count.update(sample.unused)
        turns = (*sample.messages, sample.answer_turn)
        if not sample.tools and all(len(turn) == 2 and turn["role"] in ("user", "assistant") for turn in turns):
            if self._alpaca and (lacking := alpaca.no_place_for(sample)):
                self._refuse(sample, lacking, lacking)
            return
        self._count.update(self._unshown_by_alpaca(sample) if self._alpaca else self._unshown_by_chat(sample, turns))

    def _unshown_by_alpaca(self, sample: Sample) -> list[str]:
        if lacking := alpaca.no_place_for(sample):
            self._refuse(sample, lacking, lacking)
        return _described(_own_fields((*sample.messages, sample.answer_turn)))

    def _unshown_by_chat(self, sample: Sample, turns: Sequence[Message]) -> list[str]:
        if sample.tools and not self._shows("tools", sample, turns, ()):
            self._refuse(sample, 'the chat template shows no "tools"', "tools are not shown")
        for place, turn in enumerate(turns):
            role = turn["role"]
            if role in ("user", "assistant") or self._shown.get(f"role {role}"):
                continue
            other = [*turns[:place], {**turn, "content": _OTHER_TEXT}, *turns[place + 1 :]]
            if not self._shows(f"role {role}", sample, other, sample.tools):
                why = f'the chat template shows no messages of the role "{role}"'
                self._refuse(sample, why, f'the role "{role}" is not shown')
        unshown = []
        for role, field in _own_fields(turns):
            without = [
                {name: value for name, value in turn.items() if turn["role"] != role or name != field} for turn in turns
            ]
            if not self._shows(f"{field} of {role}", sample, without, sample.tools):
                unshown.append((role, field))
        for field in MEANS_MORE.intersection(field for _, field in unshown):
            self._refuse(sample, f'the chat template shows no "{field}"', f"{field.replace('_', ' ')} are not shown")
        return _described(unshown)

    def _shows(
        self, what: str, sample: Sample, others: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> bool:
        """Whether the template prints this sample otherwise than these turns and tools, or refuses them."""
        if what not in self._shown:
            try:
                printed = self._prints((*sample.messages, sample.answer_turn), sample.tools)
            except TemplateRefusal:
                return True  # the encoder says what is wrong with this sample
            try:
                self._shown[what] = printed != self._prints(others, tools)
            except TemplateRefusal:
                self._shown[what] = True
        return self._shown[what]

    def _prints(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        assert self._chat is not None
        return self._chat.render(turns, tools, prompt=False)

    def _refuse(self, sample: Sample, why: str, kind: str) -> None:
        raise means_more(f"{self._name}, {sample.place}", why, kind)


def means_more(where: str, why: str, kind: str) -> BadRecord:
    """The error for a record of which something is left out without which the answer answers something else."""
    return BadRecord(
        f"{where}: {why}, and without it the answer would be to another question. Take a"
        " tokenizer with a chat template that shows it, or give one as a file (--chat-template FILE), or leave such"
        " records out (--bad-records skip)",
        kind,
    )


def describe(counts: Sequence[tuple[str, int]]) -> str:
    """The counted fields in words: "fields not used: id (12 records), inptu (1 record; did you mean input?)"."""
    parts = []
    cut = 0
    for field, count in counts:
        if field == BEHIND:
            cut = count
            continue
        hint = "" if field in KNOWN else did_you_mean(field, OPTIONAL).strip(" ()")
        if field in ONE_QUESTION:
            hint = 'not read beside "messages"'
        records = "1 record" if count == 1 else f"{count:,} records"
        parts.append(f"{field} ({records}{'; ' + hint if hint else ''})")
    said = [f"fields not used: {', '.join(parts)}"] if parts else []
    said += [f"{BEHIND} cut of {'1 record' if cut == 1 else f'{cut:,} records'}"] if cut else []
    return "; ".join(said)


def _own_fields(turns: Sequence[Message]) -> list[tuple[str, str]]:
    """What turns say besides role, content and an answer's reasoning (of which the encoder counts what is left out):
    role and field, each once. An empty field says nothing."""
    named = (
        (turn["role"], field)
        for turn in turns
        for field, value in turn.items()
        if field not in ("role", "content") and value not in (None, "", [], {})
    )
    named = ((role, field) for role, field in named if role != "assistant" or field not in FIELDS)
    return list(dict.fromkeys(named))


def _described(fields: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{field} of {role} messages" for role, field in fields]
