"""What records say and no model is told: fields that are not read, and those that the prompt's template does not show.

Knows chat templates by what they read and what they print. Does not know how a prompt is made (encoding.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pocl_fast.data.chat_template import ChatTemplate, TemplateRefusal
from pocl_fast.data.messages import Message
from pocl_fast.data.records import OPTIONAL, Sample
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean

MEANS_MORE = frozenset({"tools", "tool_calls"})  # without them the answer answers something else
_OTHER_TEXT = "another text"


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
        """Counts a sample's fields. Raises `InputError` with its line where the template has no place for what changes
        the question or the answer: turns, tools and their calls."""
        if sample.unused:
            self._count.update(sample.unused)
        turns = (*sample.messages, sample.answer_turn)
        if not sample.tools and all(len(turn) == 2 and turn["role"] in ("user", "assistant") for turn in turns):
            if self._alpaca and len(turns) > 2:
                self._refuse(sample, "the Alpaca template has no place for earlier turns")
            return
        self._count.update(self._unshown_by_alpaca(sample) if self._alpaca else self._unshown_by_chat(sample, turns))

    def _unshown_by_alpaca(self, sample: Sample) -> list[str]:
        roles = sorted({turn["role"] for turn in sample.messages[:-1]})
        asked = [*(["tools"] if sample.tools else []), *roles, *(["tool calls"] if _calls(sample) else [])]
        if asked:
            self._refuse(sample, f"the Alpaca template has no place for {', '.join(asked)}")
        return _described(_own_fields((*sample.messages, sample.answer_turn)))

    def _unshown_by_chat(self, sample: Sample, turns: Sequence[Message]) -> list[str]:
        if sample.tools and not self._shows("tools", sample, turns, ()):
            self._refuse(sample, 'the chat template shows no "tools"')
        for place, turn in enumerate(turns):
            role = turn["role"]
            if role in ("user", "assistant") or self._shown.get(f"role {role}"):
                continue
            other = [*turns[:place], {**turn, "content": _OTHER_TEXT}, *turns[place + 1 :]]
            if not self._shows(f"role {role}", sample, other, sample.tools):
                self._refuse(sample, f'the chat template shows no messages of the role "{role}"')
        unshown = []
        for role, field in _own_fields(turns):
            without = [
                {name: value for name, value in turn.items() if turn["role"] != role or name != field} for turn in turns
            ]
            if not self._shows(f"{field} of {role}", sample, without, sample.tools):
                unshown.append((role, field))
        for field in MEANS_MORE.intersection(field for _, field in unshown):
            self._refuse(sample, f'the chat template shows no "{field}"')
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

    def _refuse(self, sample: Sample, why: str) -> None:
        raise InputError(
            f"{self._name}, line {sample.line}: {why}, and without it the answer would be to another question. Take a"
            " tokenizer with a chat template that shows it (--template chat), or leave such records out"
        )


def describe(counts: Sequence[tuple[str, int]]) -> str:
    """The counted fields in words: "fields not used: id (12 records), inptu (1 record; did you mean input?)"."""
    parts = []
    for field, count in counts:
        hint = did_you_mean(field, OPTIONAL).strip(" ()")
        records = "1 record" if count == 1 else f"{count:,} records"
        parts.append(f"{field} ({records}{'; ' + hint if hint else ''})")
    return f"fields not used: {', '.join(parts)}" if parts else ""


def _own_fields(turns: Sequence[Message]) -> list[tuple[str, str]]:
    """What turns say besides role, content and reasoning (of which the encoder counts what is left out): role and
    field, each once. An empty field says nothing."""
    seen = ("role", "content", "reasoning_content")
    named = (
        (turn["role"], field)
        for turn in turns
        for field, value in turn.items()
        if field not in seen and value not in (None, "", [], {})
    )
    return list(dict.fromkeys(named))


def _described(fields: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{field} of {role} messages" for role, field in fields]


def _calls(sample: Sample) -> bool:
    return any(turn.get("tool_calls") for turn in (*sample.messages, sample.answer_turn))
