"""The turns of a conversation as a chat template is given them, out of the ways in which data sets write them.

Knows roles, tools and their calls, and content in parts. Does not know records (samples.py) nor templates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pocl_fast.records import json_lines
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean

SHAREGPT = (
    'these are turns of ShareGPT: rename "conversations" to "messages", "from" to "role" and "value" to "content", and'
    ' write the roles as "user" (human), "assistant" (gpt) and "system"'
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


class Message(TypedDict, total=False):
    """One turn of a conversation, as a chat template is given it; role and content are always there. A message of a
    data set keeps its other fields too."""

    role: str  # "user", "assistant", "system", "tool"
    content: str
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


def conversation(value: Any, where: str, field: str = "messages") -> list[Message]:
    """The turns of a list of messages. `where` and `field` stand for the place in messages of errors.

    A null field of a message is an absent one. Content in parts becomes the text of its parts. Raises `InputError` for
    what is no message, for content that is missing, empty or not text, and for tool calls without a name.
    """
    if not is_list(value):
        raise InputError(f'{where}: field "{field}" must be a list of messages, got {kind_of(value)}')
    return [_turn(message, f'{where}: field "{field}", item {position}') for position, message in enumerate(value)]


def turns_before(value: Any, where: str) -> list[Message]:
    """The turns of a field "history": pairs of a question and its answer, or messages. Raises `InputError` for anything
    else."""
    if isinstance(value, str):
        value = _from_json(value, f'{where}: field "history"')
    if not is_list(value):
        raise InputError(f'{where}: field "history" must be a list of [question, answer], got {kind_of(value)}')
    if value and all(isinstance(one, Mapping) for one in value):
        return conversation(value, where, "history")
    turns: list[Message] = []
    for position, pair in enumerate(value):
        if not is_list(pair) or len(pair) != 2:
            raise InputError(
                f'{where}: field "history", item {position}: expected [question, answer], got {pair!r:.60}'
            )
        for role, given in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of(given, where, "history", position)})
    return turns


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The schemas of a field "tools": a list of objects, or that list as JSON text. Null fields are absent ones, as
    Arrow fills them in. Raises `InputError` for anything else."""
    place = f'{where}: field "tools"'
    if isinstance(value, str):
        value = _from_json(value, place)
    else:
        value = without_nulls(value)
    if not is_list(value):
        raise InputError(f"{place} must be a list of schemas, or that list as JSON text; got {kind_of(value)}")
    schemas = []
    for position, schema in enumerate(value):
        item = f"{place}, item {position}"
        parsed = _from_json(schema, item) if isinstance(schema, str) else schema
        if not isinstance(parsed, Mapping):
            raise InputError(f"{item}: expected a schema (an object), got {kind_of(parsed)}")
        check_encodable(parsed, item)
        schemas.append(dict(parsed))
    return tuple(schemas)


def _turn(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f'{place}: expected "role" and "content", got {kind_of(message)}')
    given = {str(field): value for field, value in message.items() if not is_absent(value)}
    role, calls = given.pop("role", None), given.pop("tool_calls", None)
    if not calls and "function_call" in given:  # as it was called before there could be several
        calls = [{"type": "function", "function": given.pop("function_call")}]
    if not isinstance(role, str) or not ("content" in given or calls):
        if "from" in given and "value" in given:
            raise InputError(f"{place}: {SHAREGPT}")
        hint = "".join(did_you_mean(field, ["role", "content"]) for field in given if field != "content")
        raise InputError(f'{place}: expected "role" and "content"; it has {sorted(map(str, message))}{hint}')
    check_encodable(role, f'{place}, "role"')
    content = _content(given.pop("content", ""), place)
    if role.lower() in _ROLES:
        raise InputError(f'{place}: the role "{role}" is written "{_ROLES[role.lower()]}" here')
    if calls:
        given["tool_calls"] = _tool_calls(calls, place)
    if not isinstance(given.get("reasoning_content", ""), str):
        raise InputError(f'{place}: "reasoning_content" must be text, got {kind_of(given["reasoning_content"])}')
    if (not content or content.isspace()) and role not in ("tool", "system") and not calls:
        raise InputError(f'{place}: "content" must be a non-empty string: give it text, or leave the record out')
    if given:
        check_encodable(given, place)
    return {"role": role, "content": content, **given}  # type: ignore[typeddict-item]  # a data set's own fields


def _content(value: Any, place: str) -> str:
    if is_list(value):
        return "".join(_part(part, f'{place}, "content", part {i}') for i, part in enumerate(value))
    if not isinstance(value, str):
        raise InputError(f'{place}: "content" must be text, or a list of parts that are text; got {kind_of(value)}')
    check_encodable(value, f'{place}, "content"')
    return value


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return _content(part, place)
    if not isinstance(part, Mapping):
        raise InputError(f'{place}: expected {{"type": "text", "text": ...}}, got {kind_of(part)}')
    kind = part.get("type")
    if is_absent(kind):
        kind = "text" if "text" in part else "unknown"
    if kind != "text":
        raise InputError(f'{place} is of type "{kind}", and the models here read text alone: leave such records out')
    if not isinstance(part.get("text"), str):
        raise InputError(f'{place}: "text" must be text, got {kind_of(part.get("text"))}')
    return _content(part["text"], place)


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    place = f'{place}, "tool_calls"'
    calls = _from_json(value, place) if isinstance(value, str) else value
    if not is_list(calls):
        raise InputError(f"{place} must be a list of calls, or that list as JSON text; got {kind_of(calls)}")
    return [_tool_call(call, f"{place}, call {i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates print."""
    given = {field: one for field, one in call.items() if not is_absent(one)} if isinstance(call, Mapping) else {}
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f'{place}: expected {{"function": {{"name", "arguments"}}}}, got {call!r:.80}')
    function = {field: one for field, one in function.items() if not is_absent(one)}
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{place}, arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"{place}: arguments must be an object, or its JSON text; got {kind_of(arguments)}")
    function["arguments"] = dict(arguments)  # a null among them is what the call says
    return {**given, "function": function} if "function" in given else function


def calls_as_text(message: Message) -> str:
    """The tool calls of a message as JSON, one a line."""
    return "\n".join(
        json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())
    )


def text_of(value: Any, where: str, field: str, item: int | None = None) -> str:
    """A value that must be text with something in it. Raises `InputError` that names `where` and the field, or its
    item."""
    if not isinstance(value, str):
        as_text = f'; write it as text: "{value}"' if isinstance(value, (int, float)) else ""
        if isinstance(value, bytes):  # of a table's column
            as_text = "; write the column as text (`pyarrow.compute.cast(column, 'string')`)"
        raise InputError(f"{_place(where, field, item)} must be a string, got {kind_of(value)}{as_text}")
    if not value or value.isspace():
        raise InputError(f"{_place(where, field, item)} is empty: give it text, or leave it out")
    if not value.isascii():
        check_encodable(value, _place(where, field, item))
    return value


def _place(where: str, field: str, item: int | None) -> str:
    return f'{where}: field "{field}"' + ("" if item is None else f", item {item}")


def check_encodable(value: Any, place: str) -> None:
    """Raises `InputError` where text, or text within a value, has half of a surrogate pair, which no tokenizer has."""
    if isinstance(value, str) and value.isascii():
        return
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place} cannot be written as JSON ({error})") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} has half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character: leave it"
            " out, or write \\ufffd in its place"
        ) from error


def without_nulls(value: Any) -> Any:
    """The value without fields that are null, at every depth."""
    if isinstance(value, Mapping):
        return {field: without_nulls(one) for field, one in value.items() if not is_absent(one)}
    return [without_nulls(one) for one in value] if is_list(value) else value


def is_absent(value: Any) -> bool:
    """Whether a field's value says that there is none: null, or the NaN, NA or NaT that pandas writes in its place."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    pandas = sys.modules.get("pandas")  # not imported for this: who has its values has it
    return pandas is not None and (value is pandas.NA or value is pandas.NaT)


def is_list(value: Any) -> bool:
    """Whether a value is a list as records have them."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def kind_of(value: Any) -> str:
    """The type of a value, for a message."""
    return "null" if is_absent(value) else type(value).__name__


def _from_json(text: str, place: str) -> Any:
    try:
        return json_lines.decoded(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is text that is not JSON ({json_lines.in_words(error)}): {text!r:.60}") from error
