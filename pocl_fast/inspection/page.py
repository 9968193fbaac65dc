"""Samples on a page: a token is a span with its kind, its id and its place; whole pages, and parts of a report.

Does not know where samples come from, nor what else is in a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from pocl_fast.data.token_view import KINDS, Token
from pocl_fast.inspection.inspected import Inspected
from pocl_fast.inspection.shown import visible


@dataclass(frozen=True)
class _ShownToken:
    text: str
    classes: str
    title: str


@dataclass(frozen=True)
class _Shown:
    """A sample as the template reads it."""

    title: str
    tokens: list[_ShownToken]
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    left_out: str
    record: str


def page(samples: Sequence[Inspected], title: str) -> str:
    """A page of its own, in one file."""
    return str(_macro("page")(_all(samples), KINDS, title)) + "\n"


def folded(samples: Sequence[tuple[str, Inspected]]) -> Markup:
    """Samples as a part of another page, each folded below its name and its place."""
    shown = [_shown(one, f"{name}: {one.where}") for name, one in samples]
    return Markup(_macro("folded")(shown, KINDS))


def style() -> Markup:
    """The style sheet of the parts, and the colours of a page around them."""
    return Markup(_macro("style")())


def _macro(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("pocl_fast.inspection", "."), autoescape=select_autoescape(default=True)
    )
    return getattr(environment.get_template("sample.jinja").module, name)


def _all(samples: Sequence[Inspected]) -> list[_Shown]:
    return [_shown(one, one.where) for one in samples]


def _shown(one: Inspected, title: str) -> _Shown:
    tokens = [
        _ShownToken(visible(token), _classes(token, number), _title(token, _next_kind(one, number)))
        for number, token in enumerate(one.view.tokens)
    ]
    return _Shown(title, tokens, one.facts, one.notes, one.left_out, one.record)


def _classes(token: Token, number: int) -> str:
    return " ".join([token.kind, *(["odd"] if number % 2 else []), *(["added"] if token.added else [])])


def _title(token: Token, next_kind: str) -> str:
    """What hovering over a token says: ids, place, and what training does with it."""
    ids = f"id{'s' if len(token.ids) > 1 else ''} {', '.join(map(str, token.ids))}"
    place = "" if token.place is None else f"; place {token.place}"
    learns = "; the next token is learned from here" if next_kind == "supervised" and token.kind != "cut" else ""
    return f"{ids}{place}; {token.kind}{learns}"


def _next_kind(one: Inspected, number: int) -> str:
    """The kind of the token behind, of those that are kept."""
    return next((token.kind for token in one.view.tokens[number + 1 :] if token.kind != "cut"), "")
