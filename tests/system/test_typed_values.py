"""Values and declared types: what is read from text, what is refused, and how a type is called."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from pocl_fast.system.typed_values import NotEmpty, Range, describe, did_you_mean, typed


class Order(Enum):
    UP = "up"
    DOWN = "down"


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        ("3", int, 3),
        (3.0, int, 3),
        ("1e3", int, 1000),
        (3, float, 3.0),
        ("5e-5", float, 5e-5),  # as PyYAML reads 5e-5: text
        (True, bool, True),
        ("False", bool, False),
        ("on", bool, True),
        ("12", str, "12"),
        ("a/b", Path, Path("a/b")),
        ("null", int | None, None),
        ("NULL", str | None, None),
        ("none", str | None, "none"),
        ("7", int | str, 7),
        ("x", int | str, "x"),
        ("up", Order | str, "up"),
        (Order.DOWN, Order, "down"),
        ("b", Literal["a", "b"], "b"),
        ("2", Literal[1, 2], 2),
        (False, str | Literal[False] | None, False),
        ((1, "2"), list[int], [1, 2]),
        ("[1, 2]", list[int], [1, 2]),
        ("one", list[str], ["one"]),
        ('{"a": {"b": 1}}', dict | str | None, {"a": {"b": 1}}),
        ("zero3.json", dict | str | None, "zero3.json"),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        (0.5, Annotated[float, Range(at_least=0, at_most=1)] | None, 0.5),
    ],
)
def test_a_value_is_read_as_its_type(value, kind, expected):
    read = typed(value, kind)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("three", int, "must be an integer, got 'three'"),
        (True, int, "must be an integer, got True"),
        (1.5, int, "must be an integer, got 1.5"),
        ("", float, "must be a number, got ''"),
        (1, bool, "must be true or false, got 1"),
        (3, str, "must be text, got 3"),
        (None, int, "must be an integer, got None"),
        ("upp", Order | str, r"must be one of up, down; got 'upp' \(did you mean up\?\)"),
        (2, Annotated[float, Range(above=0, below=2)], "must be above 0 and below 2, got 2"),
        (float("nan"), Annotated[float, Range(above=0)], "must be above 0, got nan"),
        (0, Annotated[int, Range(at_least=1)] | None, "must be at least 1, got 0"),
        ([], Annotated[list[int], NotEmpty()], "must have at least one value, got none"),
        ([1, "x"], list[int], "value 2, must be an integer, got 'x'"),
        ('{"a": 1', dict | str | None, "is not JSON"),
        ("[1", list[int], "is not JSON"),
        ("x", dict, "must be a dict"),
        ("x", int | float, "must be an integer or a number, got 'x'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(value, kind, says):
    with pytest.raises(ValueError, match=says):
        typed(value, kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Annotated[int, Range(at_least=1)] | None, "an integer at least 1 or null"),
        (Literal["a", "b"], "one of a, b"),
        (Annotated[list[float], NotEmpty()], "a list, each value a number (at least one)"),
        (Order | str, "one of up, down"),
        (dict[str, Any] | str | None, "a dict or text or null"),
    ],
)
def test_a_type_in_words(kind, words):
    assert describe(kind) == words


def test_names_like_the_one_given_are_named():
    assert did_you_mean("learning_rat", ["learning_rate", "seed"]) == " (did you mean learning_rate?)"
    assert did_you_mean("zzz", ["learning_rate", "seed"]) == ""
