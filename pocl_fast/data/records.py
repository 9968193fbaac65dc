"""Instruction samples as they lie in a file: one JSON object a line, in one of three formats.

Does not know tokens (encoding.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from pocl_fast.system.errors import InputError

FORMATS = (
    'one of {"instruction", "input" (may be missing), "output"}, {"prompt", "response"} or'
    ' {"messages": [{"role", "content"}]}; "output" and "response" are a string or a list of accepted references'
)


class Message(TypedDict, total=False):
    """One turn of a conversation, as a chat template is given it; role and content are always there."""

    role: str  # "user", "assistant", "system", "tool"
    content: str
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


@dataclass(frozen=True)
class Sample:
    """One instruction with its accepted answers. `messages` end before the answer; the first reference is trained
    on."""

    index: int  # position among the samples of the file, from 0
    line: int  # line in the file, from 1
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    instruction: str = ""  # the last user turn in parts, for the Alpaca template
    input: str = ""
    tools: tuple[dict[str, Any], ...] = ()  # schemas of the tools that the conversation may call
    answer: Message | None = None  # the whole last turn, where it has more than its text: reasoning, tool calls

    @property
    def answer_turn(self) -> Message:
        """The turn that is trained on."""
        return self.answer or {"role": "assistant", "content": self.references[0]}


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a JSON Lines file, in file order; blank lines are skipped.

    Raises `InputError` naming file, line and field where something is missing, empty or of the wrong type.
    """
    return list(iter_samples(path))


def iter_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of `read_samples` one at a time, without keeping them; a bad line raises when it is reached."""
    path = Path(path)
    count = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _parse(text, count, number, f"{path}, line {number}")
                    count += 1
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    if not count:
        raise InputError(f"{path} holds no sample; expected JSON Lines, {FORMATS}")


def samples_from(records: Iterable[Mapping[str, Any]], name: str) -> list[Sample]:
    """The samples of records (a list of dicts, a `datasets.Dataset`) with the fields of one of the file formats.

    Raises `InputError` as `read_samples` does; `line` is the record's number, from 1.
    """
    samples = [_sample(dict(r), i, i + 1, f"{name}, record {i + 1}") for i, r in enumerate(records)]
    if not samples:
        raise InputError(f"{name} holds no sample; expected {FORMATS}")
    return samples


def _parse(text: str, index: int, line: int, where: str) -> Sample:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a line, {FORMATS}"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}; expected {FORMATS}")
    return _sample(record, index, line, where)


def _sample(record: dict[str, Any], index: int, line: int, where: str) -> Sample:
    if "messages" in record:
        messages, reference = _chat(record["messages"], where)
        last = messages[-1]["content"]
        return Sample(index, line, messages, (reference,), instruction=last)
    if "prompt" in record or "response" in record:
        prompt = _text(record, "prompt", where)
        return Sample(index, line, _user(prompt), _references(record, "response", where), instruction=prompt)
    if "instruction" in record or "output" in record:
        instruction = _text(record, "instruction", where)
        given = record.get("input") or ""
        if not isinstance(given, str):
            raise InputError(f'{where}: field "input" must be a string, got {type(given).__name__}')
        messages = _user(f"{instruction}\n\n{given}" if given.strip() else instruction)
        references = _references(record, "output", where)
        return Sample(index, line, messages, references, instruction=instruction, input=given if given.strip() else "")
    raise InputError(f"{where}: no known field in {sorted(record)}; expected {FORMATS}")


def _user(content: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": content},)


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise InputError(f'{where}: field "{field}" is missing; the line has {sorted(record)}')
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f'{where}: field "{field}" must be a string, got {type(value).__name__}')
    if not value.strip():
        raise InputError(f'{where}: field "{field}" is empty')
    return value


def _references(record: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = record.get(field)
    if not isinstance(value, list):
        return (_text(record, field, where),)
    if not value:
        raise InputError(f'{where}: field "{field}" is an empty list')
    for position, reference in enumerate(value):
        if not isinstance(reference, str) or not reference.strip():
            raise InputError(
                f'{where}: field "{field}", item {position}: expected a non-empty string, got {reference!r}'
            )
    return tuple(value)


def _chat(value: Any, where: str) -> tuple[tuple[Message, ...], str]:
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f'{where}: field "messages" must be a list of at least a user and an assistant message')
    messages: list[Message] = []
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f'{where}: field "messages", item {position}: expected "role" and "content"')
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise InputError(f'{where}: field "messages", item {position}: "content" must be a non-empty string')
        messages.append({"role": str(message["role"]), "content": message["content"]})
    if messages[-1]["role"] != "assistant":
        raise InputError(f'{where}: the last of "messages" must be the assistant\'s, got "{messages[-1]["role"]}"')
    return tuple(messages[:-1]), messages[-1]["content"]
