"""Instruction samples as they lie in a file or in memory: records in one of three forms.

Knows which fields a record may have and what they mean. Does not know bytes and JSON (json_lines.py), the turns of a
conversation (messages.py), nor tokens (encoding.py).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_fast.records import containers
from pocl_fast.records.bad_records import BadRecord, BadRecords
from pocl_fast.records.messages import (
    SHAREGPT,
    Message,
    calls_as_text,
    check_encodable,
    conversation,
    is_absent,
    text_of,
    tools_of,
    turns_before,
)
from pocl_fast.records.sources import Source, source_of
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean

FORMATS = (
    'one of {"instruction", "input" (may be missing), "output"}, {"prompt", "response"} or'
    ' {"messages": [{"role", "content"}]}; "output" and "response" are a string or a list of accepted references,'
    ' and each goes with "instruction" and "prompt" alike'
)
QUESTIONS, ANSWERS, INPUTS = ("prompt", "instruction"), ("response", "output"), ("input", "context")
OPTIONAL = (*INPUTS, "system", "history", "tools")  # what a record may have besides
KNOWN = frozenset({"messages", *QUESTIONS, *ANSWERS, *OPTIONAL})
ONE_QUESTION = frozenset({*QUESTIONS, *INPUTS})  # what only a record without messages has
KNOWN_IN_CHAT = KNOWN.difference(ONE_QUESTION)  # a question beside messages would be asked twice
REQUIRED = frozenset({"messages", *QUESTIONS, *ANSWERS})  # one of them at least
MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})  # half of the question, and no text


@dataclass(frozen=True)
class Sample:
    """One instruction with its accepted answers. `messages` end before the answer; the first reference is trained
    on."""

    index: int  # position among the samples of the file, from 0
    line: int  # line, row or record in the file, from 1
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    instruction: str = ""  # the last user turn in parts, for the Alpaca template
    input: str = ""
    tools: tuple[dict[str, Any], ...] = ()  # schemas of the tools that the conversation may call
    answer: Message | None = None  # the whole last turn, where it has more than its text: reasoning, tool calls
    unused: tuple[str, ...] = ()  # fields of the record that say something and are not read
    earlier: tuple[int, ...] = ()  # which of `messages` are answers too, that `--train-on all` trains on
    unit: str = "line"  # what `line` counts: "line", "row", "record"

    @property
    def place(self) -> str:
        """Where the sample is, as messages say it: "line 7", "row 7"."""
        return f"{self.unit} {self.line}"

    @property
    def answer_turn(self) -> Message:
        """The turn that is trained on."""
        return self.answer or {"role": "assistant", "content": self.references[0]}


def read_samples(
    given: str | Path, *, fields: Mapping[str, str] | None = None, bad: BadRecords | None = None
) -> list[Sample]:
    """The samples of a file, or of what else `--train` may name, in its order.

    `fields` says which field of a record stands for "prompt", "response" and so on. Raises `InputError` naming file,
    line and field where something is missing, empty or of the wrong type; with `bad`, such records may be left out.
    """
    return list(iter_samples(source_of(given), fields=fields, bad=bad))


def iter_samples(
    source: Source, *, fields: Mapping[str, str] | None = None, bad: BadRecords | None = None
) -> Iterator[Sample]:
    """The samples of `read_samples` one at a time, without keeping them; a bad record raises when it is reached."""
    named = ((number, record, source.place(number)) for number, record in source.records(FORMATS))
    for sample in _samples(named, source.name, fields or {}, bad or BadRecords()):
        vars(sample)["unit"] = source.unit  # as dataclasses.replace would, in a twentieth of its time
        yield sample


def samples_from(
    records: Any, name: str, *, fields: Mapping[str, str] | None = None, bad: BadRecords | None = None
) -> list[Sample]:
    """The samples of records with the fields of one of the file formats: a list of dicts, a `datasets.Dataset`, a
    generator, or whatever else `containers.rows` takes.

    Raises `InputError` as `read_samples` does; `line` is the record's number, from 1.
    """
    each = enumerate(containers.rows(records, name), start=1)
    named = ((number, record, f"{name}, record {number}") for number, record in each)
    samples = list(_samples(named, name, fields or {}, bad or BadRecords()))
    for sample in samples:
        vars(sample)["unit"] = "record"
    return samples


def _samples(
    records: Iterable[tuple[int, Mapping[str, Any] | BadRecord, str]],
    name: str,
    fields: Mapping[str, str],
    bad: BadRecords,
) -> Iterator[Sample]:
    index = 0
    for number, record, where in records:
        try:
            if isinstance(record, BadRecord):
                raise record
            sample = _sample(record, index, number, where)
        except BadRecord as error:
            bad.found(error, number)
            continue
        index += 1
        yield sample
    if not index:
        raise InputError(f"{name} holds no sample; expected {FORMATS}")


def _sample(record: Mapping[str, Any], index: int, line: int, where: str) -> Sample:
    given = {field: value for field, value in record.items() if value.__class__ is str or not is_absent(value)}
    _check_fields(given, where)
    make = _chat if "messages" in given else _instruction
    try:
        return make(given, index, line, where)
    except RecursionError as error:
        raise InputError(f"{where}: lists or objects are nested too deeply") from error


def _instruction(given: dict[str, Any], index: int, line: int, where: str) -> Sample:
    """A sample of one question and its answer."""
    answer = _one_of(given, ANSWERS, where) or ("response" if "prompt" in given else "output")
    question = _one_of(given, QUESTIONS, where) or ("prompt" if answer == "response" else "instruction")
    text, extra = _text(given, question, where), _extra_text(given, where)
    turns: tuple[Message, ...] = ({"role": "user", "content": f"{text}\n\n{extra}" if extra else text},)
    if "system" in given or "history" in given:
        turns = (*_with_system(given, _history(given, where), "history", where), *turns)
    return Sample(
        index,
        line,
        turns,
        _references(given, answer, where),
        instruction=text,
        input=extra,
        tools=_tools(given, where) if "tools" in given else (),
        unused=() if KNOWN.issuperset(given) else _unread(given, KNOWN, where),
    )


def _chat(given: dict[str, Any], index: int, line: int, where: str) -> Sample:
    """A sample of a conversation whose last message is the answer."""
    for field in (*ANSWERS, "history"):
        if given.get(field):
            raise InputError(f'{where}: both "messages" and "{field}" are given; leave out the one that is not meant')
    messages = conversation(given["messages"], where)
    if len(messages) < 2:
        raise InputError(f'{where}: field "messages" must be a list of at least a user and an assistant message')
    *before, answer = messages
    if answer["role"] != "assistant":
        raise InputError(f'{where}: the last of "messages" must be the assistant\'s, got "{answer["role"]}"')
    before = list(_with_system(given, before, "messages", where))
    return Sample(
        index,
        line,
        tuple(before),
        (_reference(answer),),
        instruction=before[-1]["content"],
        tools=_tools(given, where) if "tools" in given else (),
        answer=answer if len(answer) > 2 else None,
        unused=_unread(given, KNOWN_IN_CHAT, where),
    )


def _reference(answer: Message) -> str:
    """The answer's text; of one that calls tools and says nothing else, the calls as JSON."""
    return answer["content"] if answer["content"].strip() else calls_as_text(answer)


def _check_fields(given: Mapping[str, Any], where: str) -> None:
    """Raises `InputError` for a record without any known field, and for one that is not of text alone."""
    if REQUIRED.isdisjoint(given):
        fields = sorted(map(str, given))
        if "conversations" in given:
            raise InputError(f"{where}: no known field in {fields}; {SHAREGPT}")
        tokens = "; records are texts here, not token ids" if "input_ids" in given else ""
        raise InputError(f"{where}: no known field in {fields}{_near(given)}{tokens}; expected {FORMATS}")
    if MEDIA.isdisjoint(given):
        return
    for field in sorted(MEDIA.intersection(given)):
        if not _says_nothing(given[field]):
            raise InputError(
                f'{where}: field "{field}" is part of the question, and the models here read text alone: leave such'
                " records out, or this field where the answer does not depend on it"
            )


def _one_of(given: Collection[str], names: tuple[str, str], where: str) -> str | None:
    """The name that the record has a value for. Raises `InputError` where it has both."""
    first, second = names
    if first not in given:
        return second if second in given else None
    if second in given:
        raise InputError(f'{where}: both "{first}" and "{second}" are given, and only one is read; leave the other out')
    return first


def _extra_text(given: Mapping[str, Any], where: str) -> str:
    """What follows the instruction: its input or context, empty where there is none."""
    found = ""
    for name in INPUTS:
        if name not in given or _says_nothing(given[name]):
            continue
        if not isinstance(given[name], str) or not given[name].isspace():
            _one_of((found, name), INPUTS, where)
            found = name
    return text_of(given[found], where, found) if found else ""


def _system(given: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if _says_nothing(given.get("system", "")):
        return ()
    return ({"role": "system", "content": text_of(given["system"], where, "system")},)


def _with_system(given: Mapping[str, Any], before: Sequence[Message], field: str, where: str) -> Sequence[Message]:
    """The turns with the system message of the field "system" at their head. Raises `InputError` where the turns, those
    of `field`, have another."""
    system = _system(given, where)
    if not system or not before or before[0]["role"] != "system":
        return [*system, *before]
    if before[0]["content"] != system[0]["content"]:
        raise InputError(f'{where}: "system" and the system message in "{field}" differ; leave one out')
    return before


def _history(given: Mapping[str, Any], where: str) -> Sequence[Message]:
    return turns_before(given["history"], where) if given.get("history") else ()


def _tools(given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    return () if _says_nothing(given["tools"]) else tools_of(given["tools"], where)


def _text(given: Mapping[str, Any], field: str, where: str) -> str:
    if field not in given:
        fields = sorted(map(str, given))
        raise InputError(f'{where}: field "{field}" is missing; the line has {fields}{_near(given, (field,))}')
    return text_of(given[field], where, field)


def _references(given: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = given.get(field)
    if value.__class__ is str or not isinstance(value, (list, tuple)):
        return (_text(given, field, where),)
    if not value:
        raise InputError(f'{where}: field "{field}" is an empty list: give it an answer, or leave the record out')
    for position, reference in enumerate(value):
        # the call costs as much as the rest, and some samples have many references
        if reference.__class__ is not str or not reference.isascii() or not reference or reference.isspace():
            text_of(reference, where, field, position)
    return tuple(value)


def _unread(given: Mapping[str, Any], known: frozenset[str], where: str) -> tuple[str, ...]:
    """The names of fields outside of `known` that say something."""
    left = [field for field, value in given.items() if field not in known and not _says_nothing(value)]
    for field in left:
        check_encodable(str(field), f"{where}: the name of a field")
    return tuple(sys.intern(str(field)) for field in left)  # each line's JSON makes them anew


def _says_nothing(value: Any) -> bool:
    return not value and isinstance(value, (str, list, tuple, dict))


def _near(given: Mapping[str, Any], known: tuple[str, ...] = ("messages", *QUESTIONS, *ANSWERS)) -> str:
    """ " (did you mean x instead of y?)" where a field that is not known is like one that is."""
    for field in given:
        if field not in KNOWN and (hint := did_you_mean(field, known)):
            return hint.replace("?)", f' instead of "{field}"?)')
    return ""
