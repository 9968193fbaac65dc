"""The turns of a conversation as a chat template is given them, out of the ways in which data sets write them.

Knows who speaks under which name, what a turn says, and which turns a data set takes out of the training. Does not know
records (samples.py) nor templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.texts import (
    check_encodable,
    from_json,
    is_absent,
    is_list,
    kind_of,
    listed,
    medium,
    says_nothing,
    text_of,
)
from pocl_fast.records.tools import call_turn, calls_of
from pocl_fast.system.typed_values import did_you_mean

NO_MESSAGE, NO_TURNS = "not a message", "not a list of messages"
_CALL = "tool_call"  # an assistant's turn whose text is a call
# how data sets, ShareGPT's above all, call who speaks -> the role that templates know. Other names go to the template.
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function"), "tool"),  # the last: OpenAI's, once
    **dict.fromkeys((_CALL, "function_call"), _CALL),
    "system": "system",
}
_NAMES = {"role", "from"}  # of who speaks
_PLAIN = ("user", "assistant", "system")
# the switches of OpenAI, axolotl and ms-swift: whether a turn is trained on -> their values
_TRAIN = {"weight": "0 or 1", "train": "true or false", "loss": "true or false"}

_TEXT = ("text", "input_text", "output_text")  # the last two: OpenAI's responses
# parts that say something which a message has a place of its own for -> where
_ELSEWHERE = {
    "tool_use": 'write the call into the message\'s "tool_calls"',
    "tool_result": 'write the result as a message of the role "tool"',
    "thinking": 'write it into the message\'s "reasoning_content"',
    "reasoning": 'write it into the message\'s "reasoning_content"',
}


class Message(TypedDict, total=False):
    """One turn of a conversation, as a chat template is given it; role and content are always there. A message of a
    data set keeps its other fields too."""

    role: str  # "user", "assistant", "system", "tool"
    content: str
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


class Turns(NamedTuple):
    """The turns of a conversation."""

    messages: list[Message]
    answers: list[int]  # places of the assistant's turns, but for those that the data set takes out of the training


def conversation(value: Any, where: str, field: str = "messages") -> Turns:
    """The turns of a list of messages, or of its JSON text. `where` and `field` stand for the place in errors.

    A message is `role` and `content`, or `from` and `value` as in ShareGPT. An object of columns, `{"role": [...],
    "content": [...]}`, as `datasets` writes its feature Sequence, is the list of messages that it was made of. A null
    field of a message is an absent one. Content in parts becomes the text of its parts. An assistant's turn with
    `"weight": 0` or `"train": false` is no answer. Raises `BadRecord` for what is no message, for content that is
    missing, empty or not text, for tool calls without a name, and for a role that is called by two names.
    """
    place = f'{where}: field "{field}"'
    value = from_json(value, place) if isinstance(value, str) else listed(value)
    if isinstance(value, Mapping):
        value = _of_columns(value, place)
    if not is_list(value):
        raise BadRecord(f"{place} must be a list of messages, got {kind_of(value)}", NO_TURNS)
    turns = Turns([], [])
    spelt: dict[str, str] = {}
    for position, message in enumerate(value):
        turn = _turn(message, spelt, place, position)
        trained = turn["role"] == "assistant"
        if len(turn) > 2 and not _TRAIN.keys().isdisjoint(turn):
            trained = _is_trained(turn, f"{place}, item {position}")
        if trained:
            turns.answers.append(position)
        turns.messages.append(turn)
    return turns


def are_columns(value: Any) -> bool:
    """Whether an object has a list of those who speak, as messages by columns have."""
    return isinstance(value, Mapping) and any(is_list(listed(value.get(name))) for name in _NAMES)


def _of_columns(value: Mapping[Any, Any], place: str) -> list[dict[Any, Any]]:
    """The messages of an object that has a list for each of their fields. Raises `BadRecord` for any other."""
    columns = {field: listed(column) for field, column in value.items() if not is_absent(column)}
    lengths = {field: len(column) for field, column in columns.items() if is_list(column)}
    if not lengths:
        one = " It is one message: write it in a list" if _NAMES & columns.keys() else ""
        raise BadRecord(f"{place} must be a list of messages, got an object.{one}", NO_TURNS)
    if lengths.keys() != columns.keys() or len(set(lengths.values())) > 1:
        shown = ", ".join(f'"{field}" {lengths.get(field, "no list")}' for field in columns)
        raise BadRecord(
            f"{place} is an object of lists, which are no messages side by side, for their lengths differ ({shown}):"
            ' write a list of messages, [{"role": ..., "content": ...}, ...]',
            NO_TURNS,
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def turns_before(value: Any, where: str) -> Turns:
    """The turns of a field "history": pairs of a question and its answer, or messages. Raises `BadRecord` for anything
    else."""
    value = from_json(value, f'{where}: field "history"') if isinstance(value, str) else listed(value)
    if are_columns(value):
        return conversation(value, where, "history")
    if not is_list(value):
        raise BadRecord(
            f'{where}: field "history" must be a list of [question, answer], got {kind_of(value)}', NO_TURNS
        )
    if value and all(isinstance(one, Mapping) for one in value):
        return conversation(value, where, "history")
    turns = Turns([], [])
    for position, pair in enumerate(map(listed, value)):
        if not is_list(pair) or len(pair) != 2:
            raise BadRecord(
                f'{where}: field "history", item {position}: expected [question, answer], got {pair!r:.60}', NO_TURNS
            )
        for role, given in zip(("user", "assistant"), pair, strict=True):
            turns.messages.append({"role": role, "content": text_of(given, where, "history", position)})
        turns.answers.append(len(turns.messages) - 1)
    return turns


def _turn(message: Any, spelt: dict[str, str], field: str, position: int) -> Message:
    """The message at a position of a field. `spelt` keeps how the roles of this conversation are called."""
    if message.__class__ is dict and len(message) == 2:
        role: Any = message.get("role")
        content: Any = message.get("content")
        if _is_plain(role, content) and spelt.setdefault(role, role) == role:
            return {"role": role, "content": content}
    if not isinstance(message, Mapping):
        raise BadRecord(f'{field}, item {position}: expected "role" and "content", got {kind_of(message)}', NO_MESSAGE)
    given = {str(name): value for name, value in message.items() if value.__class__ is str or not is_absent(value)}
    role, content = given.pop("role", None), given.pop("content", None)
    if not given and _is_plain(role, content) and spelt.setdefault(role, role) == role:
        return {"role": role, "content": content}
    return _any_turn(message, given, role, content, spelt, f"{field}, item {position}")


def _is_plain(role: Any, content: Any) -> bool:
    """Whether a turn is as most are, so that nothing is to be checked."""
    if role not in _PLAIN or content.__class__ is not str:
        return False
    return bool(content) and content.isascii() and not content.isspace()


def _any_turn(
    message: Mapping[Any, Any], given: dict[str, Any], role: Any, content: Any, spelt: dict[str, str], place: str
) -> Message:
    """A turn that has more than a role and plain text. `given` is the message without these, and without nulls."""
    if role is None and "from" in given:
        role, content = given.pop("from"), _only(content, given.get("value"), "content", "value", place)
    else:
        role = _only(role, given.get("from"), "role", "from", place)
        content = given.get("value") if content is None else content
    key = "content" if content is not given.get("value") else "value"
    if key == "value":
        given.pop("value", None)
    calls = given.pop("tool_calls", None)
    calls = calls if calls is None else listed(calls)
    if not calls and "function_call" in given:  # as it was called before there could be several
        calls = [{"type": "function", "function": given.pop("function_call")}]
    if not isinstance(role, str) or (content is None and not calls):
        hint = "".join(did_you_mean(field, ["role", "content"]) for field in given if field != "content")
        raise BadRecord(
            f'{place}: expected "role" and "content" (or "from" and "value"); it has {sorted(map(str, message))}{hint}',
            NO_MESSAGE,
        )
    check_encodable(role, f'{place}, "role"')
    role = _role(role, spelt, place)
    if role == _CALL:
        role, content, calls = "assistant", "", call_turn(content, place)
    content = _content("" if content is None else content, place, key)
    if calls:
        given["tool_calls"] = calls_of(calls, f'{place}, "tool_calls"')
    if not isinstance(given.get("reasoning_content", ""), str):
        kind = kind_of(given["reasoning_content"])
        raise BadRecord(f'{place}: "reasoning_content" must be text, got {kind}', "not text")
    if (not content or content.isspace()) and role not in ("tool", "system") and not calls:
        raise BadRecord(
            f'{place}: "{key}" must be a non-empty string: give it text, or leave the record out', "empty text"
        )
    if given:
        check_encodable(given, place)
    return {"role": role, "content": content, **given}  # type: ignore[typeddict-item]  # a data set's own fields


def _only(ours: Any, sharegpt: Any, name: str, other: str, place: str) -> Any:
    """What a message says under one of two names. Raises `BadRecord` where it says something under both."""
    if ours is not None and sharegpt is not None:
        raise BadRecord(f'{place}: both "{name}" and "{other}" are given, and only one is read', NO_MESSAGE)
    return sharegpt if ours is None else ours


def _role(given: str, spelt: dict[str, str], place: str) -> str:
    """The role that templates know for what a data set calls it; one that is not known stays as it is."""
    role = _ROLES.get(given.lower())
    if role is None:
        return given
    if (before := spelt.setdefault(role, given)) != given:
        raise BadRecord(
            f'{place}: "{before}" and "{given}" in one conversation may be one who speaks or two: give both one name',
            "two names of a role",
        )
    return role


def _is_trained(turn: Message, place: str) -> bool:
    """Whether a turn is an answer to train on, as its switches say. Takes those that are obeyed out of it."""
    given: dict[str, Any] = turn  # type: ignore[assignment]  # a data set's own fields
    said = {name: given.pop(name) for name in _TRAIN if name in given and not says_nothing(given[name])}
    if turn["role"] != "assistant":  # what others say is never trained on
        given.update({name: value for name, value in said.items() if value})
        return False
    for name, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRecord(f'{place}: "{name}" must be {_TRAIN[name]}, got {value!r:.40}', f"{name} of a turn")
    if len({bool(value) for value in said.values()}) > 1:
        raise BadRecord(f"{place}: {' and '.join(said)} contradict each other", f"{min(said)} of a turn")
    return all(said.values())


def _content(value: Any, place: str, key: str) -> str:
    """The text of a message's content, which it has under `key`. Raises `BadRecord` for what is not text, and for parts
    that are none."""
    if not isinstance(value, str):
        value = listed(value)
        if not is_list(value):
            raise BadRecord(
                f'{place}: "{key}" must be text, or a list of parts that are text; got {kind_of(value)}', "not text"
            )
        return "".join(_part(part, f'{place}, "{key}", part {i}') for i, part in enumerate(value))
    if not value.isascii():
        check_encodable(value, f'{place}, "{key}"')
    return value


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        check_encodable(part, place)
        return part
    if not isinstance(part, Mapping):
        raise BadRecord(f'{place}: expected {{"type": "text", "text": ...}}, got {kind_of(part)}', "not text")
    kind = part.get("type")
    if is_absent(kind):
        kind = "text" if "text" in part else "unknown"
    kind = str(kind)
    if kind in _ELSEWHERE:
        raise BadRecord(f'{place} is of type "{kind}": {_ELSEWHERE[kind]}', f"a part of type {kind}")
    media = next((name for name in part if medium(name) and not is_absent(part[name])), kind)
    if kind not in _TEXT or media != kind:
        raise BadRecord(
            f'{place} is of type "{media}", and the models here read text alone: leave such records out'
            " (--bad-records skip)",
            medium(media) or "a part that is no text",
        )
    if not isinstance(part.get("text"), str):
        raise BadRecord(f'{place}: "text" must be text, got {kind_of(part.get("text"))}', "not text")
    check_encodable(part["text"], place)
    return str(part["text"])
