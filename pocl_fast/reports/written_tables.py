"""Tables as text of at most 100 columns, as Markdown and as LaTeX, and what must be escaped in each.

Does not know what is in the tables.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from pocl_fast.reports.comparison_tables import Cell, Table

WIDTH = 100
_NAME = 40  # characters of a name's line as text


def as_text(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables and notes for a terminal; tables that are wider than 100 columns are cut into several."""
    parts = [_text(part) for table in tables for part in _cut(table)]
    lines = [textwrap.fill(_line(note), WIDTH, initial_indent="- ", subsequent_indent="  ") for note in notes]
    return "\n\n".join([*parts, "\n".join(lines)])


def as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables and notes as GitHub's Markdown."""
    parts = []
    for table in tables:
        rule = ["---"] * table.words + ["---:"] * (len(table.heads) - table.words)
        rows = [[_bold(cell, markdown, "**{}**") for cell in row] for row in table.rows]
        lines = ["| " + " | ".join(row) + " |" for row in ([markdown(head) for head in table.heads], rule, *rows)]
        parts.append("\n".join([f"### {markdown(table.title)}", "", *lines, *_after(table, markdown)]))
    return "\n\n".join([*parts, "\n".join(f"- {markdown(note)}" for note in notes)])


def as_latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables and notes as LaTeX, to be put into a document that uses the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        columns = "l" * table.words + "r" * (len(table.heads) - table.words)
        rows = [" & ".join(_bold(cell, latex, r"\textbf{{{}}}") for cell in row) + r" \\" for row in table.rows]
        heads = " & ".join(map(latex, table.heads)) + r" \\"
        parts.append(
            "\n".join(
                [
                    *(r"\begin{table}", r"\centering", rf"\caption{{{latex(table.title)}}}"),
                    *(rf"\begin{{tabular}}{{{columns}}}", r"\toprule", heads, r"\midrule", *rows, r"\bottomrule"),
                    *(r"\end{tabular}", *_after(table, latex), r"\end{table}"),
                ]
            )
        )
    items = [rf"\item {latex(note)}" for note in notes]
    return "\n\n".join([*parts, "\n".join([r"\begin{itemize}", *items, r"\end{itemize}"])])


_IN_LATEX = {
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': r"{\char34}",
    "[": "{[}",  # behind \\ or \item a bracket would begin an argument, and an asterisk mean something
    "*": "{*}",
    "]": "{]}",
    "−": "$-$",
    "≥": r"$\geq$",
    "†": r"\textdagger{}",
}


def latex(text: str) -> str:
    """A text as LaTeX shows it: what has a meaning there is escaped."""
    return "".join(_IN_LATEX.get(sign, sign) for sign in _line(text))


def markdown(text: str) -> str:
    """A text as Markdown shows it, in a cell of a table too."""
    escaped = re.sub(r"([\\`*|~$])", r"\\\1", _line(text))
    escaped = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)  # within a word it is no emphasis
    return escaped.replace("](", r"]\(").replace("&", "&amp;").replace("<", "&lt;")


def _line(text: str) -> str:
    """A text in one line, without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.split()))


def _bold(cell: Cell, escape: Callable[[str], str], form: str) -> str:
    return form.format(escape(cell.text)) if cell.strong else escape(cell.text)


def _after(table: Table, escape: Callable[[str], str]) -> list[str]:
    return ["", escape(table.note)] if table.note else []


def _text(table: Table) -> str:
    """A table whose long words go on in the next line."""
    heads = [[Cell(head) for head in table.heads], *table.rows]
    wrapped = [
        [
            textwrap.wrap(_line(cell.text), _NAME, break_on_hyphens=False) or [""] if place < table.words
            else [_line(cell.text)]
            for place, cell in enumerate(row)
        ]
        for row in heads
    ]  # fmt: skip
    widths = [max(len(line) for row in wrapped for line in row[place]) for place in range(len(table.heads))]
    lines = [_line(table.title)]
    for row in wrapped:
        for number in range(max(map(len, row))):
            cells = [cell[number] if number < len(cell) else "" for cell in row]
            sides = [
                cell.ljust(width) if place < table.words else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append(("  " + "  ".join(sides)).rstrip())
    return "\n".join([*lines, *(["  " + table.note] if table.note else [])])


def _cut(table: Table) -> list[Table]:
    """The table, or where it is too wide parts of its figures, each beside all of its words."""
    widths = [max(len(_line(text)) for text in column) + 2 for column in _columns(table)]
    fixed = sum(min(width, _NAME + 2) for width in widths[: table.words])
    groups = [
        range(place, min(place + table.together, len(widths)))
        for place in range(table.words, len(widths), table.together)
    ]
    parts: list[list[range]] = [[]]
    for group in groups:
        if parts[-1] and fixed + sum(widths[place] for place in chain(*parts[-1], group)) > WIDTH:
            parts.append([])
        parts[-1].append(group)
    return [_of_columns(table, [*range(table.words), *chain(*part)]) for part in parts]


def _columns(table: Table) -> list[list[str]]:
    return [[head, *(row[place].text for row in table.rows)] for place, head in enumerate(table.heads)]


def _of_columns(table: Table, places: Sequence[int]) -> Table:
    rows = tuple(tuple(row[place] for place in places) for row in table.rows)
    return replace(table, heads=tuple(table.heads[place] for place in places), rows=rows)
