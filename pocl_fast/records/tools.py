"""The tools that a conversation may call, and its calls, as chat templates are given them.

Knows the ways in which data sets write both. Does not know who speaks (messages.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.texts import check_encodable, from_json, is_absent, is_list, kind_of, listed, without_nulls

BAD_TOOLS, BAD_CALL = "not a tool", "not a tool call"


def are_schemas(value: Any) -> bool:
    """Whether a field's value, or its JSON text, is a list that has a schema: an object with a name and parameters.
    Fields that are called as tools once were hold other things in some data sets."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else ()
        except (ValueError, RecursionError):
            return False
    value = listed(value)
    return is_list(value) and any(
        isinstance(one, Mapping) and "name" in one and isinstance(one.get("parameters"), Mapping | str) for one in value
    )


def tools_of(value: Any, where: str, field: str = "tools") -> tuple[dict[str, Any], ...]:
    """The schemas of a field such as "tools": a list of objects, or that list as JSON text. Null fields are absent
    ones, as Arrow fills them in. A function alone becomes `{"type": "function", "function": ...}`, as transformers has
    it. Raises `BadRecord` for anything else."""
    place = f'{where}: field "{field}"'
    value = from_json(value, place) if isinstance(value, str) else without_nulls(listed(value))
    if value is None:  # as JSON text, where other records have tools
        return ()
    if not is_list(value):
        raise BadRecord(
            f"{place} must be a list of schemas, or that list as JSON text; got {kind_of(value)}", BAD_TOOLS
        )
    return tuple(_schema(schema, f"{place}, item {position}") for position, schema in enumerate(value))


def _schema(given: Any, place: str) -> dict[str, Any]:
    schema = from_json(given, place) if isinstance(given, str) else given
    if not isinstance(schema, Mapping):
        raise BadRecord(f"{place}: expected a schema (an object), got {kind_of(schema)}", BAD_TOOLS)
    check_encodable(schema, place)
    if "input_schema" in schema:
        raise BadRecord(f'{place} is of Anthropic\'s form: write its "input_schema" as "parameters"', BAD_TOOLS)
    if not isinstance(schema.get("name"), str) or "function" in schema or schema.get("type", "function") != "function":
        return dict(schema)
    return {"type": "function", "function": {field: one for field, one in schema.items() if field != "type"}}


def calls_of(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a field "tool_calls", or of a turn that is a call: a list, or its JSON text. Raises `BadRecord` for
    anything else."""
    calls = from_json(value, place) if isinstance(value, str) else listed(value)
    if not is_list(calls):
        raise BadRecord(f"{place} must be a list of calls, or that list as JSON text; got {kind_of(calls)}", BAD_CALL)
    return [_call(call, f"{place}, call {i}") for i, call in enumerate(calls)]


def call_turn(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a turn whose text is a call, or a list of calls, as JSON."""
    given = from_json(value, place) if isinstance(value, str) else listed(value)
    if not (isinstance(given, Mapping) or (is_list(given) and given)):
        raise BadRecord(f'{place}: expected a call as JSON, {{"name", "arguments"}}, got {kind_of(given)}', BAD_CALL)
    return calls_of([given] if isinstance(given, Mapping) else given, place)


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates print, as transformers has it."""
    given = {field: one for field, one in call.items() if not is_absent(one)} if isinstance(call, Mapping) else {}
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRecord(f'{place}: expected {{"function": {{"name", "arguments"}}}}, got {call!r:.80}', BAD_CALL)
    function = {field: one for field, one in function.items() if not is_absent(one)}
    if "arguments" not in function and "parameters" in function:  # as Llama's own calls have it
        function["arguments"] = function.pop("parameters")
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{place}, arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise BadRecord(f"{place}: arguments must be an object, or its JSON text; got {kind_of(arguments)}", BAD_CALL)
    function["arguments"] = dict(arguments)  # a null among them is what the call says
    if "function" in given:
        return {**given, "function": function}
    about = {field: function.pop(field) for field in ("id", "type") if field in function}
    return {"type": "function", **about, "function": function}


def calls_as_text(message: Mapping[str, Any]) -> str:
    """The tool calls of a message as JSON, one a line."""
    return "\n".join(
        json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())
    )
