"""The form in which a benchmark hands on a table, and how it looks on a console and in Markdown.

    {"title": str, "claim": str, "columns": [str], "rows": [[cell]], "note": str or [str]}

`title` is a heading, `claim` says what the table shows, `note` what must be said besides; several notes become a list.
A cell is a string, a number, or None where there is nothing to say; numbers are given unrounded. Only `columns` and
`rows` must be there. Knows nothing of what is measured.
"""

from __future__ import annotations

import textwrap
from typing import Any

LINE = 100  # of Markdown, but for tables
Table = dict[str, Any]


def is_table(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("columns"), list) and isinstance(value.get("rows"), list)


def cell(value: Any) -> str:
    """Three digits of a number."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    digits = next((digits for digits, least in enumerate((100, 10, 1, 0.1)) if size >= least), 4)
    return f"{value:.{digits}f}" if size else "0"


def notes(table: Table) -> list[str]:
    note = table.get("note") or []
    return [" ".join(text.split()) for text in ([note] if isinstance(note, str) else note)]


def console(table: Table) -> str:
    rows = [[cell(value) for value in row] for row in (table["columns"], *table["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [table["title"]] if table.get("title") else []
    for row in rows:
        first, *others = (
            f"{text:{'<>'[k > 0]}{width}}" for k, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join([*lines, *(f"- {note}" for note in notes(table))])


def markdown(table: Table, level: int) -> str:
    """With its title as a heading of this level."""
    parts = [f"{'#' * level} {table['title']}"] if table.get("title") else []
    if table.get("claim"):
        parts.append(wrapped(table["claim"]))
    if table["rows"]:
        rules = [
            "---:" if k and _numeric([row[k] for row in table["rows"]]) else "---" for k in range(len(table["columns"]))
        ]
        rows = [table["columns"], rules, *table["rows"]]
        parts.append("\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in rows))
    said = notes(table)
    if said:
        parts.append(wrapped(said[0]) if len(said) == 1 else "\n".join(wrapped(note, "- ") for note in said))
    return "\n\n".join(parts)


def wrapped(text: str, bullet: str = "") -> str:
    """A paragraph, or an item of a list, in lines of Markdown."""
    indent = " " * len(bullet)
    return textwrap.fill(
        text, LINE, initial_indent=bullet, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _escaped(value: Any) -> str:
    return " ".join(cell(value).split()).replace("|", "\\|")


def _numeric(values: list[Any]) -> bool:
    """Whether most cells of a column that are not empty are numbers, or begin with one."""
    texts = [text for text in map(cell, values) if text not in ("", "–")]
    return 2 * sum(text.lstrip("-")[:1].isdigit() for text in texts) > len(texts)
