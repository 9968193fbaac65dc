"""Instruction samples as they lie in a file or in memory: records of one of several forms.

Knows what the fields of each form mean. Does not know bytes and JSON (json_lines.py), the names of fields (forms.py),
the turns of a conversation (messages.py), nor tokens (encoding.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocl_fast.records import containers
from pocl_fast.records.bad_records import BadRecord, BadRecords
from pocl_fast.records.forms import FORMATS, INPUTS, KNOWN, ONE_QUESTION, TWO_FORMS, FieldNames, Form, form_of
from pocl_fast.records.json_lines import DEEP
from pocl_fast.records.messages import Message, Turns, are_columns, conversation, turns_before
from pocl_fast.records.sources import Source, source_of
from pocl_fast.records.texts import check_encodable, is_absent, is_list, listed, says_nothing, text_of
from pocl_fast.records.tools import are_schemas, calls_as_text, tools_of
from pocl_fast.system.errors import InputError

KNOWN_IN_CHAT = KNOWN.difference(ONE_QUESTION)  # a question beside messages would be asked twice
NO_ANSWER = "no assistant turn"
_GOOD = ("label", "kto_tag")  # whether an answer is a good one: TRL's name, LLaMA-Factory's
_BESIDE = frozenset({*_GOOD, "functions"})  # the last: how OpenAI called the tools once
BEHIND = "turns behind the last answer"  # which nobody answers, or which are not to be trained on


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
    unused: tuple[str, ...] = ()  # what of the record says something and is not read
    earlier: tuple[int, ...] = ()  # places in `messages` of answers too, that `--train-on all` trains on; ascending
    unit: str = "line"  # what `line` counts: "line", "row", "record"

    @property
    def place(self) -> str:
        """Where the sample is, as messages say it: "line 7", "row 7"."""
        return f"{self.unit} {self.line}"

    @property
    def answer_turn(self) -> Message:
        """The turn that is trained on."""
        return self.answer or {"role": "assistant", "content": self.references[0]}

    def up_to(self, place: int) -> Sample:
        """The sample that ends with an earlier answer, that at `messages[place]`. Raises ValueError for a turn that is
        none."""
        if place not in self.earlier:
            raise ValueError(f"messages[{place}] is none of the earlier answers {self.earlier}")
        answer, before = self.messages[place], self.messages[:place]
        return replace(
            self,
            messages=before,
            references=(_reference(answer),),
            instruction=before[-1]["content"] if before else "",
            input="",
            answer=answer if len(answer) > 2 else None,
            unused=(),
            earlier=tuple(one for one in self.earlier if one < place),
        )


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
    reading = _Reading(source.name, source.unit, source.place, fields, bad)
    return reading.samples(source.records(FORMATS))


def samples_from(
    records: Any, name: str, *, fields: Mapping[str, str] | None = None, bad: BadRecords | None = None
) -> list[Sample]:
    """The samples of records with the fields of one of the file formats: a list of dicts, a `datasets.Dataset`, a
    generator, or whatever else `containers.rows` takes.

    Raises `InputError` as `read_samples` does; `line` is the record's number, from 1.
    """
    each = enumerate(containers.rows(records, name), start=1)
    return list(_Reading(name, "record", lambda number: f"{name}, record {number}", fields, bad).samples(each))


class _Reading:
    """One pass over records: all of one form, each a sample or a bad record."""

    def __init__(
        self,
        name: str,
        unit: str,
        place: Callable[[int], str],
        fields: Mapping[str, str] | None,
        bad: BadRecords | None,
    ) -> None:
        """`place` says in errors where the record of a number is."""
        self._name, self._unit, self._place = name, unit, place
        self._fields = FieldNames(fields) if fields else None
        self._bad = bad or BadRecords()
        self._form: Form | None = None
        self._first = self._others = 0  # the number of the first sample's record; how many are of another form

    def samples(self, records: Iterable[tuple[int, Mapping[str, Any] | BadRecord]]) -> Iterator[Sample]:
        index = 0
        for number, record in records:
            try:
                sample = self._sample(record, index, number)
            except BadRecord as error:
                self._bad.found(error, number)
                continue
            index += 1
            if self._unit != "line":
                vars(sample)["unit"] = self._unit  # as dataclasses.replace would, in a twentieth of its time
            yield sample
        self._bad.check_left(index, self._name, self._unit)
        if self._others > index:
            raise InputError(
                f"{self._name}: {self._others} records were left out as not of the form of the first,"
                f" {self._form and self._form.name} ({self._unit} {self._first}), and only {index} are: leave those out"
            )
        if not index:
            raise InputError(f"{self._name} holds no sample; expected {FORMATS}")
        if self._fields:
            self._fields.check_seen(self._name)

    def _sample(self, record: Mapping[str, Any] | BadRecord, index: int, number: int) -> Sample:
        if isinstance(record, BadRecord):
            raise record
        where = self._place(number)
        if self._fields is None:
            return self._read(record, index, number, where)
        given, unread = self._fields.named(record, where)
        try:
            sample = self._read(given, index, number, where)
        except BadRecord as error:
            raise BadRecord(f"{error}{self._fields.hint(str(error))}", error.kind) from error
        return replace(sample, unused=(*sample.unused, *_interned(unread, where))) if unread else sample

    def _read(self, record: Mapping[str, Any], index: int, number: int, where: str) -> Sample:
        given = {
            field: value if value.__class__ is str else listed(value)
            for field, value in record.items()
            if value.__class__ is str or not is_absent(value)
        }
        form = form_of(given, where)
        if not _BESIDE.isdisjoint(given):
            given = self._without_beside(given, form, where)
        make = _chat if form.is_chat else _instruction
        try:
            sample = make(given, form, index, number, where)
        except RecursionError as error:
            raise BadRecord(f"{where}: lists or objects are nested too deeply", DEEP) from error
        if form is not self._form:
            self._check_form(form, number, where)
        return sample

    def _without_beside(self, given: dict[str, Any], form: Form, where: str) -> dict[str, Any]:
        """The record without fields that say whether its answer is a good one, and with tools by their name. Raises
        `BadRecord` for an answer that is not to be learnt; what --fields names is meant, whatever such a field says."""
        for field in (field for field in _GOOD if isinstance(given.get(field), bool)):
            if not given[field] and not (self._fields and self._fields.names(form.answer)):
                raise BadRecord(
                    f'{where}: "{field}" is false, which marks an answer that is not to be learnt: --bad-records skip'
                    f" leaves such records out, and --fields {form.answer}={form.answer} trains on them whatever it"
                    " says",
                    f"{field} false",
                )
            given = {name: value for name, value in given.items() if name != field}
        if are_schemas(functions := given.get("functions")):
            if not says_nothing(given.get("tools", "")):
                raise BadRecord(f'{where}: both "tools" and "functions" are given; leave one out', TWO_FORMS)
            given = {name: value for name, value in given.items() if name != "functions"}
            given["tools"] = tools_of(functions, where, "functions")
        return given

    def _check_form(self, form: Form, number: int, where: str) -> None:
        """Raises `BadRecord` where the records before are of another form."""
        if self._form is None:
            self._form, self._first = form, number
            return
        self._others += 1
        raise BadRecord(
            f"{where} is {form.name}, but the records before it, from {self._unit} {self._first}, are"
            f" {self._form.name}: write them in one form, or in a file each",
            "another form than the first",
        )


def _instruction(given: dict[str, Any], form: Form, index: int, line: int, where: str) -> Sample:
    """A sample of one question and its answer."""
    question = given.get(form.question)
    if question.__class__ is not str and (is_list(question) or are_columns(question)):
        return _prompt_of_messages(given, form, index, line, where)
    text, extra = text_of(question, where, form.question), _extra_text(given, where)
    turns: tuple[Message, ...] = ({"role": "user", "content": f"{text}\n\n{extra}" if extra else text},)
    earlier: Sequence[int] = ()
    if "system" in given or "history" in given:
        history = turns_before(given["history"], where) if given.get("history") else Turns([], [])
        before, earlier = _with_system(given, history, "history", where)
        turns = (*before, *turns)
    return Sample(
        index,
        line,
        turns,
        _references(given, form.answer, where),
        instruction=text,
        input=extra,
        tools=_tools(given, where) if "tools" in given else (),
        unused=() if KNOWN.issuperset(given) else _unread(given, KNOWN, where),
        earlier=tuple(earlier),
    )


def _prompt_of_messages(given: dict[str, Any], form: Form, index: int, line: int, where: str) -> Sample:
    """A sample of the turns before an answer, and the turns from it on: of those alone the answers are trained on."""
    before, behind = given[form.question], given[form.answer]
    if form.answer != "completion" or not (_of_messages(behind) or are_columns(behind)):
        kind = "a list" if is_list(before) else "an object"
        raise BadRecord(
            f'{where}: field "{form.question}" is {kind}, and "{form.answer}" is no list of messages: give both as'
            ' text, or as messages: "prompt": [{"role": "user", "content": ...}],'
            ' "completion": [{"role": "assistant", "content": ...}]',
            "text beside messages",
        )
    prompt = conversation(before, where, form.question).messages
    completion = conversation(behind, where, "completion")
    turns = Turns([*prompt, *completion.messages], [len(prompt) + place for place in completion.answers])
    return _of_turns(given, turns, index, line, where, "completion")


def _of_messages(value: Any) -> bool:
    return is_list(value) and any(isinstance(one, Mapping) for one in value)


def _chat(given: dict[str, Any], form: Form, index: int, line: int, where: str) -> Sample:
    """A sample of a conversation."""
    turns = conversation(given[form.answer], where, form.answer)
    return _of_turns(given, turns, index, line, where, form.answer)


def _of_turns(given: dict[str, Any], turns: Turns, index: int, line: int, where: str, field: str) -> Sample:
    """A sample whose answer is the last one of these turns; `field` has the answers."""
    if given.get("history"):
        raise BadRecord(
            f'{where}: both "{field}" and "history" are given; leave out the one that is not meant', TWO_FORMS
        )
    if not turns.answers:
        raise _unanswered(turns, where, field)
    last = turns.answers[-1]
    answer = turns.messages[last]
    if not last:
        raise BadRecord(
            f'{where}: field "{field}" must be a list of at least a user and an assistant message: nothing is asked'
            " before the assistant's last turn",
            "no question",
        )
    before, earlier = turns.messages[:last], turns.answers[:-1]
    if "system" in given:
        before, earlier = _with_system(given, Turns(before, earlier), field, where)
    unused = _unread(given, _READ_BESIDE[field], where)
    return Sample(
        index,
        line,
        tuple(before),
        (_reference(answer),),
        instruction=before[-1]["content"],
        tools=_tools(given, where) if "tools" in given else (),
        answer=answer if len(answer) > 2 else None,
        unused=unused if last == len(turns.messages) - 1 else (*unused, BEHIND),
        earlier=tuple(earlier),
    )


_READ_BESIDE = {
    "messages": KNOWN_IN_CHAT,
    "conversations": KNOWN_IN_CHAT,
    "completion": KNOWN_IN_CHAT.union({"prompt", "instruction"}),
}


def _unanswered(turns: Turns, where: str, field: str) -> BadRecord:
    """The error for turns that have no answer."""
    roles = list(dict.fromkeys(turn["role"] for turn in turns.messages))
    if "assistant" in roles:
        return BadRecord(
            f'{where}: every turn of the assistant in "{field}" is one not to be trained on ("weight" or "train")',
            "no turn to train on",
        )
    spoken = f"those who speak are {', '.join(roles)}" if roles else "it is empty"
    return BadRecord(
        f'{where}: field "{field}" has no turn of the assistant, which is what is trained on; {spoken}', NO_ANSWER
    )


def _reference(answer: Message) -> str:
    """The answer's text; of one that calls tools and says nothing else, the calls as JSON."""
    return answer["content"] if answer["content"].strip() else calls_as_text(answer)


def _extra_text(given: Mapping[str, Any], where: str) -> str:
    """What follows the instruction: its input or context, empty where there is none."""
    found = ""
    for name in INPUTS:
        if name not in given or says_nothing(given[name]):
            continue
        if not isinstance(given[name], str) or not given[name].isspace():
            if found:
                raise BadRecord(
                    f'{where}: both "{found}" and "{name}" are given, and only one is read; leave the other out',
                    TWO_FORMS,
                )
            found = name
    return text_of(given[found], where, found) if found else ""


def _with_system(given: Mapping[str, Any], turns: Turns, field: str, where: str) -> tuple[list[Message], list[int]]:
    """The turns with the system message of the field "system" at their head, and the places of their answers. Raises
    `BadRecord` where the turns, those of `field`, have another."""
    before, answers = turns
    if says_nothing(given.get("system", "")):
        return before, answers
    said = text_of(given["system"], where, "system")
    if not before or before[0]["role"] != "system":
        return [{"role": "system", "content": said}, *before], [place + 1 for place in answers]
    if before[0]["content"] != said:
        raise BadRecord(
            f'{where}: "system" and the system message in "{field}" differ; leave one out', "two system messages"
        )
    return before, answers


def _tools(given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    return () if says_nothing(given["tools"]) else tools_of(given["tools"], where)


def _references(given: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = given[field]
    if value.__class__ is str or not is_list(value):
        return (text_of(value, where, field),)
    if not value:
        raise BadRecord(
            f'{where}: field "{field}" is an empty list: give it an answer, or leave the record out', "empty text"
        )
    if _of_messages(value):
        raise BadRecord(
            f'{where}: field "{field}" is a list of messages, and the question is text: give both as text, or both as'
            ' messages ("prompt" and "completion"), or one conversation ("messages")',
            "text beside messages",
        )
    for position, reference in enumerate(value):
        # the call costs as much as the rest, and some samples have many references
        if reference.__class__ is not str or not reference.isascii() or not reference or reference.isspace():
            text_of(reference, where, field, position)
    return tuple(value)


def _unread(given: Mapping[str, Any], known: frozenset[str], where: str) -> tuple[str, ...]:
    """The names of fields outside of `known` that say something."""
    if known.issuperset(given):
        return ()
    return _interned([field for field, value in given.items() if field not in known and not says_nothing(value)], where)


def _interned(fields: Iterable[Any], where: str) -> tuple[str, ...]:
    """Names of fields, each kept in memory once: each line's JSON makes them anew."""
    for field in fields:
        check_encodable(str(field), f"{where}: the name of a field")
    return tuple(sys.intern(str(field)) for field in fields)
