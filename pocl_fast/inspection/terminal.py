"""Samples in a terminal: tokens in colours, or in brackets where there are none; a table below.

Does not know where samples come from.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import TextIO

from pocl_fast.data.token_view import KINDS, Kind, Token, TokenView
from pocl_fast.inspection.inspected import Inspected
from pocl_fast.inspection.shown import columns, visible

# not told apart by colour alone: what is trained on is bold, what is cut is struck out
_STYLES: dict[Kind, str] = {"prompt": "36", "supervised": "1;32", "context": "35", "cut": "9;31"}
_ADDED, _OTHER = "7", "4"  # reverse; every second token is underlined, so that borders are seen
_WIDE = 100  # columns where no terminal says how many it has


def has_colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours and nobody has asked for none (NO_COLOR)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width() -> int:
    """The terminal's width in columns."""
    return max(20, shutil.get_terminal_size((_WIDE, 24)).columns)


def as_text(one: Inspected, *, colours: bool, wide: int, ids: bool = False) -> str:
    """A sample as lines: its tokens, wrapped to `wide` columns, and a table of them; with a line a token for `ids`."""
    lines = [one.where]
    if one.left_out:
        lines += _said("", f"not trained on: {one.left_out}", wide if colours else 0)
    lines.append("")
    if one.record:
        lines += [one.record, ""]
    if one.view.tokens:
        lines += [*_legend(one.view, colours, wide), "", *_flow(one.view, colours, wide), ""]
    if ids and one.view.tokens:
        lines += [*_listing(one.view), ""]
    for name, value in (*one.facts, *(("note", note) for note in one.notes)):
        lines += _said(f"{name:<15}", value, wide if colours else 0)
    return "\n".join(lines).rstrip() + "\n"


def _said(name: str, value: str, wide: int) -> list[str]:
    """Words behind their name, wrapped beside it to `wide` columns; one line where these are too few, or 0."""
    if wide < len(name) + 20:
        return [name + value]
    indent = " " * len(name)
    options = {"initial_indent": name, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.wrap(value, wide, **options)  # type: ignore[arg-type]


def _legend(view: TokenView, colours: bool, wide: int) -> list[str]:
    if not colours:
        return ["a · is between two tokens; ⟦ ⟧ is around a token that no text is cut into"]
    names = [f" {kind} " for kind in KINDS if view.count(kind)]
    styles = [*(_STYLES[kind] for kind in KINDS if view.count(kind)), _ADDED]
    names.append(" added token ")
    painted = "  ".join(map(_painted, names, styles))
    rest = "every second token is underlined"
    return [f"{painted}  {rest}"] if len("  ".join([*names, rest])) <= wide else [painted, rest]


def _flow(view: TokenView, colours: bool, wide: int) -> Iterator[str]:
    """The tokens one behind the other, in lines."""
    if colours:
        cells = [(visible(token), _style(token, number)) for number, token in enumerate(view.tokens)]
        yield from _wrapped(cells, wide)
        return
    for kind, run in groupby(view.tokens, key=lambda token: token.kind):
        yield f"[{kind}]"
        cells = [cell for token in run for cell in (("·", ""), (_bracketed(token), ""))]
        yield from _wrapped(cells[1:], wide)


def _bracketed(token: Token) -> str:
    return f"⟦{visible(token)}⟧" if token.added else visible(token)


def _style(token: Token, number: int) -> str:
    parts = [_STYLES[token.kind], _ADDED if token.added else "", _OTHER if number % 2 else ""]
    return ";".join(part for part in parts if part)


def _wrapped(cells: list[tuple[str, str]], wide: int) -> Iterator[str]:
    """Lines of at most `wide` columns, broken before a token, and within one that is longer than a line."""
    line, used = "", 0
    for text, style in cells:
        if used and used + columns(text.split("\n")[0]) > wide >= columns(text):
            yield line
            line, used = "", 0
        for piece, ends in _pieces(text, wide, used):
            line += _painted(piece, style)
            used += columns(piece)
            if ends:
                yield line
                line, used = "", 0
    if line:
        yield line


def _pieces(text: str, wide: int, used: int) -> Iterator[tuple[str, bool]]:
    """A text in pieces that fit behind `used` columns and into whole lines; whether a line ends behind each."""
    piece = ""
    for sign in text:
        if sign == "\n":
            yield piece, True
            piece, used = "", 0
            continue
        if used + columns(piece + sign) > wide:
            yield piece, True
            piece, used = "", 0
        piece += sign
    if piece:
        yield piece, False


def _painted(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


def _listing(view: TokenView) -> Iterator[str]:
    """A line a token: its place, its ids, its kind, its text."""
    yield f"{'place':>6} {'id':>8}  {'kind':<11} token"
    for token in view.tokens:
        for position, one in enumerate(token.ids):
            place = "" if token.place is None else token.place + position
            said = _bracketed(token).replace("\n", "") if position == 0 else "(with the token before it)"
            yield f"{place:>6} {one:>8}  {token.kind:<11} {said}"
