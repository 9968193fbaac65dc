"""Values and the types that a dataclass declares for them: reads a value, refuses a wrong one, and names a type.

Knows Python's types and ranges of numbers. Does not know which options there are. The command line, YAML files and the
trainer check values by these rules.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Range:
    """The bounds of a number, as metadata of `Annotated`. NaN and infinities are outside of every range."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, value: float) -> None:
        """Raises ValueError where the value is outside."""
        fits = (
            abs(value) < math.inf
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if not fits:
            raise ValueError(f"must be {self}, got {value!r}")

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {_short(bound)}" for name, bound in bounds.items() if bound is not None)


def _short(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


@dataclass(frozen=True)
class NotEmpty:
    """At least one value in a list, as metadata of `Annotated`."""

    def check(self, value: Collection[Any]) -> None:
        """Raises ValueError for an empty list."""
        if not value:
            raise ValueError("must have at least one value, got none")

    def __str__(self) -> str:
        return "(at least one)"


def typed(value: Any, kind: Any) -> Any:
    """The value as its declared type has it: numbers and booleans may be text, a tuple is a list, a lone string is a
    list of one, text in braces is a JSON dict.

    `kind` is a type as `typing.get_type_hints(..., include_extras=True)` gives it: int, float, bool, str, Path, a dict,
    a list, an Enum, a Literal, unions of these, and `Annotated` with a `Range` or `NotEmpty`. An Enum's value comes
    back as plain text or number. Raises ValueError, whose message goes on from the option's name.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = typed(value, parts[0])
        for bound in parts[1:]:
            if hasattr(bound, "check"):
                bound.check(value)
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, kind)
    if origin is Literal:
        return _choice(value, list(parts))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice(value.value if isinstance(value, Enum) else value, [member.value for member in kind])
    if kind is list or origin is list:
        return _list(value, parts[0] if parts else Any)
    if kind is dict or origin is dict:
        return _dict(value)
    return _plain(value, kind)


def _one_of(value: Any, kind: Any) -> Any:
    members = typing.get_args(kind)
    if type(None) in members:
        if value is None or (isinstance(value, str) and value.lower() == "null"):
            return None
        members = tuple(member for member in members if member is not type(None))
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members = tuple(member for member in members if member is not str)  # a text must be one of the Enum's values
    if isinstance(value, str) and value.startswith("{") and any(dict in (m, typing.get_origin(m)) for m in members):
        return _dict(value)  # and not the path of a file
    problems = []
    for member in sorted(members, key=lambda member: member in (str, Path)):  # any text is a str: last
        try:
            return typed(value, member)
        except ValueError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise ValueError(problems[0])
    raise ValueError(f"must be {describe(kind)}, got {value!r}")


def _choice(value: Any, known: list[Any]) -> Any:
    for choice in known:
        if (type(value) is type(choice) and value == choice) or (isinstance(value, str) and value == str(choice)):
            return choice
    raise ValueError(f"must be one of {', '.join(map(str, known))}; got {value!r}{did_you_mean(value, known)}")


def _list(value: Any, of: Any) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):
        value = _json(value)
    if isinstance(value, str) and of is str:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list, got {value!r}")
    values = []
    for place, one in enumerate(value, start=1):
        try:
            values.append(typed(one, of))
        except ValueError as error:
            raise ValueError(f"value {place}, {error}") from error
    return values


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.startswith("{"):
        value = _json(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a dict (JSON on the command line), got {value!r}")
    return dict(value)


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error}): {value!r}") from error


def _plain(value: Any, kind: Any) -> Any:
    wrong = ValueError(f"must be {describe(kind)}, got {value!r}")
    if kind is Any:
        return value
    if isinstance(value, numbers.Number) and not isinstance(value, (bool, int, float)):
        value = _of_numpy(value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _WORDS:
            return _WORDS[value.lower()]
        raise wrong
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong
        try:
            number = int(value) if kind is int and not isinstance(value, float) else float(value)
        except ValueError:
            try:
                number = float(value)  # an integer such as 1e6
            except ValueError as error:
                raise wrong from error
        if kind is int and isinstance(number, float):
            if not number.is_integer():
                raise wrong
            number = int(number)
        return number
    if kind is Path:
        if not isinstance(value, (str, Path)):
            raise wrong
        return Path(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise wrong


def _of_numpy(value: Any) -> Any:
    """NumPy's integers and floats as Python's; anything else as it is."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def describe(kind: Any) -> str:
    """A type in words, with its range: "an integer at least 1", "a list of numbers"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return " ".join([describe(parts[0]), *(str(bound) for bound in parts[1:] if hasattr(bound, "check"))])
    if origin in (Union, types.UnionType):
        named = [part for part in parts if part is not type(None)]
        if any(isinstance(part, type) and issubclass(part, Enum) for part in named):
            named = [part for part in named if part is not str]
        return " or ".join([*map(describe, named), *(["null"] if type(None) in parts else [])])
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if origin is list:
        return "a list, each value " + describe(parts[0])
    if origin is dict:
        return "a dict"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", dict: "a dict"}
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


def hints_of(group: type) -> dict[str, Any]:
    """Field name -> declared type of a dataclass, with its ranges. `Field.type` is not read: transformers'
    `HfArgumentParser` rewrites it."""
    return typing.get_type_hints(group, include_extras=True)


def did_you_mean(name: Any, known: Collection[Any]) -> str:
    """ " (did you mean x?)" where known names are like the one given, else nothing."""
    return asked_for(near_names(str(name), [str(one) for one in known]))


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that are like the one given, at most three, the nearest first."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.6)


def asked_for(names: Sequence[str]) -> str:
    """ " (did you mean x or y?)"; nothing for no names."""
    return f" (did you mean {' or '.join(names)}?)" if names else ""
