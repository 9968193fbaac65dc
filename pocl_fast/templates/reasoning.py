"""Reasoning in the answers of records: where it is, and answers without it.

Knows messages and the tags around reasoning. Does not know templates, nor tokens (encoding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

from pocl_fast.records.messages import Message
from pocl_fast.records.samples import Sample
from pocl_fast.records.tools import calls_as_text

Reasoning = Literal["keep", "strip", "only"]
Tags: TypeAlias = Sequence[tuple[str, str]]  # what opens and closes it; "": the prompt opens it
FIELDS = ("reasoning_content", "reasoning", "thinking")  # a message's own field of it, as the templates call it


def reasoning_in(message: Any, tags: Tags) -> str:
    """The beginning of an answer's content that is a block of reasoning, to the end of its closing tag; or empty."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return ""
    for opens, closes in tags:
        if closes in content and content.lstrip().startswith(opens or closes.replace("/", "", 1)):
            return content[: content.index(closes) + len(closes)]
    for opens, closes in tags:  # of a prompt that opens it
        if not opens and closes in content:
            return content[: content.index(closes) + len(closes)]
    return ""


def thoughts_of(message: Any, tags: Tags) -> list[str]:
    """The texts of an answer's reasoning: in fields of their own, and in its content. Empty ones are left out."""
    if message["role"] != "assistant":
        return []
    found = [value.strip() for name in FIELDS if isinstance(value := message.get(name), str)]
    block = reasoning_in(message, tags).strip()
    for opens, closes in tags:
        if block.endswith(closes):
            opened = opens or closes.replace("/", "", 1)
            block = block.removesuffix(closes).removeprefix(opened).strip()
    return [thought for thought in (*found, block) if thought]


def without_reasoning(message: Message, tags: Tags) -> Message:
    """The turn without its reasoning; the same object where it has none."""
    head = reasoning_in(message, tags)
    fields = [name for name in FIELDS if isinstance(message.get(name), str)] if message["role"] == "assistant" else []
    if not head and not fields:
        return message
    kept: Any = {name: value for name, value in message.items() if name not in fields}
    return {**kept, "content": message["content"][len(head) :].lstrip()} if head else kept


def stripped(sample: Sample, tags: Tags) -> Sample:
    """The sample without reasoning in its answers; the same object where it has none."""
    messages = tuple(without_reasoning(message, tags) for message in sample.messages)
    given = sample.answer_turn
    answer = without_reasoning(given, tags)
    references = tuple(without_reasoning(_said(one), tags)["content"] for one in sample.references)
    if answer is given and references == sample.references and all(map(_same, messages, sample.messages)):
        return sample
    if sample.answer is not None:
        text = answer["content"]
        references = (text if text.strip() else calls_as_text(answer),)
    kept = answer if sample.answer is not None and len(answer) > 2 else None
    return replace(sample, messages=messages, references=references, answer=kept)


def is_empty(message: Message) -> bool:
    """Whether an answer says and calls nothing."""
    return not message["content"].strip() and not message.get("tool_calls")


class Closed(NamedTuple):
    """Where the reasoning in an answer's text ends: `tag` is in it so many `times` until then."""

    tag: str
    times: int


def closed_in(text: str, message: Any, tags: Tags) -> Closed | None:
    """Where the reasoning of this turn ends in the text that a template wrote of it; None where it is not in it."""
    thoughts = thoughts_of(message, tags)
    place = text.find(thoughts[0]) if thoughts else -1
    if place < 0:
        return None
    behind = place + len(thoughts[0])
    ends = [(text.index(closes, behind), closes) for _, closes in tags if text.find(closes, behind) >= 0]
    if not ends:
        return Closed(thoughts[0], 1)
    end, tag = min(ends)
    return Closed(tag, text.count(tag, 0, end + len(tag)))


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _same(one: Any, other: Any) -> bool:
    return one is other
