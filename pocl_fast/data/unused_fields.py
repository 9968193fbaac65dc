"""What records say and no model is told: fields that are not read, and those that the prompt's template does not show.

Knows chat templates by what they read and what they print. Does not know how a prompt is made (encoding.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from pocl_fast.data.chat_template import ChatTemplate
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
        self._shown: dict[str, bool] = {}  # of what was looked at so far
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
        unshown = self._unshown_by_alpaca(sample) if self._alpaca else self._unshown_by_chat(sample, turns)
        self._count.update(f"{field} of messages" for field in unshown)

    def _unshown_by_alpaca(self, sample: Sample) -> list[str]:
        roles = sorted({turn["role"] for turn in sample.messages[:-1]})
        asked = [*(["tools"] if sample.tools else []), *roles, *(["tool calls"] if _calls(sample) else [])]
        if asked:
            self._refuse(sample, f"the Alpaca template has no place for {', '.join(asked)}")
        return _own_fields((*sample.messages, sample.answer_turn))

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
        for field in _own_fields(turns):
            if self._shown.get(field):
                continue
            without = [{name: value for name, value in turn.items() if name != field} for turn in turns]
            if not self._shows(field, sample, without, sample.tools):
                unshown.append(field)
        for field in MEANS_MORE.intersection(unshown):
            self._refuse(sample, f'the chat template shows no "{field}"')
        return unshown

    def _shows(
        self, what: str, sample: Sample, others: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> bool:
        """Whether the template names the field, or prints this sample otherwise than these turns and tools."""
        if what not in self._shown:
            if what in self._names:
                self._shown[what] = True
            else:
                try:
                    printed = self._prints((*sample.messages, sample.answer_turn), sample.tools)
                    self._shown[what] = printed != self._prints(others, tools)
                except Exception:
                    return True
        return self._shown[what]

    @cached_property
    def _names(self) -> frozenset[str]:
        """The names and texts in the template's code, among which are the fields that it reads."""
        from jinja2 import Environment, TemplateError  # here, not above: most records have no such field

        assert self._chat is not None
        try:
            tokens = [token for source in self._chat.texts.values() for token in Environment().lex(source)]
        except TemplateError:
            return frozenset()
        return frozenset(text.strip("\"'") for _, kind, text in tokens if kind in ("name", "string"))

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


def _own_fields(turns: Sequence[Message]) -> list[str]:
    """What turns have besides role, content and reasoning (of which the encoder counts what is left out), each once."""
    seen = ("role", "content", "reasoning_content")
    return list(dict.fromkeys(field for turn in turns for field in turn if field not in seen))


def _calls(sample: Sample) -> bool:
    return any(turn.get("tool_calls") for turn in (*sample.messages, sample.answer_turn))
