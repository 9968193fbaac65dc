"""The forms that a record may have, told by its fields; and records whose fields have other names (`--fields`).

Knows the names of fields and which go together. Does not know what they hold (samples.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.texts import MEDIA, is_absent, is_list, listed, medium, says_nothing
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean

FORMATS = (
    'one of {"prompt", "response"}, {"instruction", "input" (may be missing), "output"}, {"prompt", "completion"},'
    ' {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}; other names by --fields, such as'
    " --fields prompt=question response=answer"
)
CHATS = ("messages", "conversations")
QUESTIONS, ANSWERS, INPUTS = ("prompt", "instruction"), ("response", "output", "completion"), ("input", "context")
OPTIONAL = (*INPUTS, "system", "history", "tools")  # what a record may have besides
REQUIRED = frozenset({*CHATS, *QUESTIONS, *ANSWERS})  # one of them at least
KNOWN = REQUIRED.union(OPTIONAL)
ONE_QUESTION = frozenset({*QUESTIONS, *INPUTS})  # what only a record without messages has
# of each, a record may say one: --fields chooses among them too
ALTERNATIVES = (frozenset({*CHATS, *ANSWERS}), frozenset(QUESTIONS), frozenset(INPUTS))
TWO_FORMS, NO_FIELD, MISSING = "two forms", "no known field", "a missing field"
_PREFERENCE = "chosen"  # the accepted answer of a pair

_SHOWN = 30  # fields of a record that a message names at most
_ALIKE = 0.75  # of 1: system_prompt is no misspelt prompt (0.63), and has another meaning

_ABSENT = object()


class Form(NamedTuple):
    """Which fields of a record hold its question and its answer."""

    name: str
    answer: str  # or the whole conversation
    question: str = ""  # none where a conversation has it

    @property
    def is_chat(self) -> bool:
        return not self.question


_FORMS = {frozenset(pair): Form("/".join(pair), pair[1], pair[0]) for pair in product(QUESTIONS, ANSWERS)}
for _chat in CHATS:  # data sets repeat the question beside a conversation: that is counted as not read
    for _beside in ((), ("prompt",), ("instruction",), QUESTIONS):
        _FORMS[frozenset({_chat, *_beside})] = Form(_chat, _chat)


def form_of(given: Mapping[str, Any], where: str) -> Form:
    """The form of a record, without its null fields. Raises `BadRecord` for one of none or of two, and for one that is
    not of text alone."""
    form = _plain_form(tuple(given))
    if form is not None:
        return form
    _refuse_media(given, where)
    said = REQUIRED.intersection(given)
    form = _FORMS.get(said)
    if form is None:  # an empty field may be there because another record has it
        form = _FORMS.get(frozenset(field for field in said if not says_nothing(given[field])))
    if form is None:
        raise _of_none(given, where) if not said else _not_one(given, said, where)
    return form


@lru_cache(maxsize=1000)  # the records of a file have few sets of fields
def _plain_form(fields: tuple[Any, ...]) -> Form | None:
    return _FORMS.get(REQUIRED.intersection(fields)) if MEDIA.isdisjoint(fields) else None


def missing(given: Mapping[str, Any], field: str, where: str) -> BadRecord:
    """The error for a record without a field that its form has."""
    return BadRecord(
        f'{where}: field "{field}" is missing; the line has {_some(given)}'
        f"{_near(given, (field,)) or _preference(given) or f'; --fields {field}=FIELD says what else it is called'}"
        "; --bad-records skip leaves such records out",
        MISSING,
    )


def _not_one(given: Mapping[str, Any], said: frozenset[str], where: str) -> BadRecord:
    """Why these fields are no form, or more than one."""
    found = frozenset(field for field in said if not says_nothing(given[field])) or said
    chats = [name for name in CHATS if name in found]
    answers = [name for name in ANSWERS if name in found]
    questions = [name for name in QUESTIONS if name in found]
    if not chats and not answers:
        text = isinstance(given[questions[0]], str)
        return missing(given, ("response" if "prompt" in found else "output") if text else "completion", where)
    if not chats and not questions:
        return missing(given, "instruction" if answers == ["output"] else "prompt", where)
    asked = questions or ["instruction" if answers == ["output"] else "prompt"]
    forms = [*chats, *(f"{question}/{answer}" for answer in answers for question in asked)]
    # the fields of which only one can be meant: two questions where there is one answer
    two = [*chats, *answers] if len(chats) + len(answers) > 1 else questions
    return BadRecord(
        f'{where}: both "{two[0]}" and "{two[1]}" are given: the record fits two forms, {" and ".join(forms[:2])}, and'
        f" only one is read. Leave the other out, or say which one is meant: --fields {two[0]}={two[0]}",
        TWO_FORMS,
    )


def _of_none(given: Mapping[str, Any], where: str) -> BadRecord:
    hint = _preference(given)
    within = [str(field) for field, value in given.items() if is_list(value) and value and _are_objects(value)]
    if "input_ids" in given:
        hint = "; records are texts here, not token ids"
    elif "text" in given:
        hint = (
            '; "text" alone has no question and no answer, and what is learnt here is answers: split it into "prompt"'
            ' and "completion"'
        )
    elif not hint and within == ["data"]:
        hint = "; if the records are those in \"data\", `jq -c '.data[]' FILE` writes each in a line of its own"
    return BadRecord(f"{where}: no known field in {_some(given)}{_near(given)}{hint}; expected {FORMATS}", NO_FIELD)


def _preference(given: Mapping[str, Any]) -> str:
    if _PREFERENCE not in given:
        return ""
    told, question = isinstance(given[_PREFERENCE], str), given.get("prompt")
    if told and question is None:  # as Anthropic's hh-rlhf
        return '; this is a pair of preferences, each with its question: split "chosen" into "prompt" and "completion"'
    name = "response" if told else "completion" if is_list(question) else "messages"
    return f"; this is a pair of preferences: --fields {name}={_PREFERENCE} trains on the accepted answer"


def _refuse_media(given: Mapping[str, Any], where: str) -> None:
    for field in sorted(MEDIA.intersection(given)):
        if not says_nothing(given[field]):
            raise BadRecord(
                f'{where}: field "{field}" is part of the question, and the models here read text alone: leave such'
                " records out, or this field where the answer does not depend on it",
                medium(field),
            )


def _near(given: Mapping[str, Any], known: tuple[str, ...] = (*CHATS, *QUESTIONS, *ANSWERS)) -> str:
    """ " (did you mean x instead of y?)" where a field that is not known is like one that is."""
    pairs = ((difflib.SequenceMatcher(None, str(field), one).ratio(), field, one) for field in given for one in known)
    near = max((pair for pair in pairs if pair[1] not in KNOWN), key=itemgetter(0), default=(0.0, "", ""))
    if near[0] < _ALIKE:
        return ""
    return f' (did you mean {near[2]} instead of "{near[1]}"?)'


def _some(given: Mapping[str, Any]) -> str:
    """The names of a record's fields, in words: not all of a file of columns that was read as one record."""
    fields = sorted(map(str, given))
    return f"{fields[:_SHOWN]}"[:-1] + f", ... {len(fields):,} in all]" if len(fields) > _SHOWN else f"{fields}"


def _are_objects(values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def check_names(fields: Mapping[Any, Any]) -> None:
    """Raises `InputError` for a mapping of fields with a name that is none, that names two fields for one thing, or
    one field for two."""
    of: dict[str, str] = {}
    for name, field in fields.items():
        if name not in KNOWN:
            known = [*CHATS, *QUESTIONS, *ANSWERS, *OPTIONAL]
            swapped = isinstance(field, str) and field in KNOWN
            hint = did_you_mean(str(name), known) or (f" (did you mean {field}={name}?)" if swapped else "")
            raise InputError(
                f"{name}={field}: nothing is called {name!r} here{hint}; NAME is one of"
                f" {', '.join(known)}, and FIELD is what the records call it"
            )
        if not isinstance(field, str) or not field:
            raise InputError(f"{name}={field}: expected the name of a field of the records, got {field!r:.60}")
        if (other := of.setdefault(field, name)) != name:
            raise InputError(f'both {other} and {name} are "{field}": a field is one of them')
    for alternatives in ALTERNATIVES:
        if len(both := [name for name in fields if name in alternatives]) > 1:
            raise InputError(f"of {' and '.join(both)} a record has one: name that one")


class FieldNames:
    """Reads records by other names. What is named is meant: fields of the record's own that would say the same are not
    read, and counted as such."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        """Raises `InputError` as `check_names` does."""
        try:
            check_names(fields)
        except InputError as error:
            raise InputError(f"--fields: {error}") from error
        self._fields = dict(fields)
        self._unseen = {name for name in fields if name in OPTIONAL}
        self._columns: list[str] = []  # of the first record
        same = (names for names in ALTERNATIVES if not names.isdisjoint(fields))
        self._displaced = frozenset(fields).union(*same)

    def named(self, record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
        """A record by our names, and what of it is not read for that. Raises `BadRecord` where it lacks a field that is
        named, if it is one of a question or an answer: others may be missing in some records."""
        self._columns = self._columns or [str(field) for field in record]
        given: dict[str, Any] = {}
        taken, unread = set(), []
        for name, path in self._fields.items():
            value, root, beside = (record[path], path, []) if path in record else _within(record, path)
            if value is _ABSENT and name not in OPTIONAL:
                raise BadRecord(self._lacks(name, [str(field) for field in record], where), MISSING)
            if value is not _ABSENT:
                given[name] = value
                taken.add(root)
                unread += [other for other in beside if other not in unread and not self._reads(other)]
                self._unseen.discard(name)
        for field, value in record.items():
            if field in taken:
                continue
            if field not in self._displaced:
                given[field] = value
            elif not (is_absent(value) or says_nothing(value)):
                unread.append(f"{field} beside --fields")
        return given, unread

    def _reads(self, path: str) -> bool:
        return any(field == path or field.startswith(f"{path}.") for field in self._fields.values())

    def names(self, name: str) -> bool:
        """Whether a field is named to stand for this one of ours."""
        return name in self._fields

    def check_seen(self, name: str) -> None:
        """Raises `InputError` for a named field that none of the records of `name` has had."""
        if self._unseen:
            raise InputError(self._lacks(min(self._unseen), self._columns, name))

    def hint(self, message: str) -> str:
        """What is to be added to a message about a record, where it speaks of fields by our names."""
        used = [f'"{name}" is the field "{field}"' for name, field in self._fields.items() if f'"{name}"' in message]
        return f" (by --fields {', '.join(used)})" if used else ""

    def _lacks(self, name: str, columns: list[str], where: str) -> str:
        field = self._fields[name]
        near = did_you_mean(field, columns)
        return f'{where}: --fields {name}={field}: there is no field "{field}"{near}; there are {", ".join(columns)}'


def _within(record: Mapping[str, Any], path: str) -> tuple[Any, str, list[str]]:
    """The value at a dotted path into a record, such as answers.text or turns.0.text, the field it begins with, and the
    paths of what is beside it; `_ABSENT` where there is none."""
    value: Any = record
    beside: list[str] = []
    walked = ""
    for part in path.split("."):
        value = listed(value)
        if isinstance(value, Mapping) and part in value:
            others = (
                key for key, other in value.items() if key != part and not (is_absent(other) or says_nothing(other))
            )
        elif is_list(value) and part.isdecimal() and int(part) < len(value):
            others = (str(place) for place in range(len(value)) if place != int(part))
        else:
            return _ABSENT, "", []
        beside += [f"{walked}{other}" for other in others if walked]
        value = value[part] if isinstance(value, Mapping) else value[int(part)]
        walked += f"{part}."
    return value, path.partition(".")[0], beside
