"""`pocl-fast compare`: which runs, and where the comparison is printed and written. Loads neither torch nor a model."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json, write_text

FILES = {"text": "comparison.txt", "markdown": "comparison.md", "latex": "comparison.tex"}


@dataclass(frozen=True)
class Compared:
    """Which runs are compared, and how that is shown."""

    runs: Positional[list[Path]]
    """Run directories, evaluated on the same data sets; those that differ in --seed alone are one method."""
    names: list[str] = field(default_factory=list)
    """What methods are called: a name for each method, in the order of their first runs; or one for each run, where
    runs of one name are a method. Without it, the options that differ."""
    output: Path | None = None
    """A folder for comparison.html, with the curves of all runs, and the same as .txt, .md, .tex and .json."""
    format: Literal["text", "markdown", "latex"] = "text"
    """What is printed: tables for the terminal, for GitHub, or for a paper (with the package booktabs)."""
    json: bool = False
    """Print all figures as JSON instead."""


def compare(given: Compared) -> None:
    """Prints a comparison, and writes its files where they are asked for. Raises `InputError` as `compare_runs` does,
    and where nothing can be written."""
    if given.output is not None and given.output.exists() and not given.output.is_dir():
        raise InputError(f"--output {given.output} is a file; give a folder")
    from pocl_fast.reports.comparison import compare_runs

    comparison = compare_runs(given.runs, given.names)
    forms = written(comparison)
    text = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) if given.json else forms[given.format]
    stream: Any = sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # of a terminal without Unicode
    print(text)
    if given.output is not None:
        page = save(comparison, given.output)
        print(f"page: {page}", file=sys.stderr if given.json or given.format != "text" else sys.stdout)


def written(comparison: Any) -> dict[str, str]:
    """A comparison in each form that can be printed."""
    from pocl_fast.reports.comparison_tables import tables_of
    from pocl_fast.reports.written_tables import as_latex, as_markdown, as_text

    tables, notes = tables_of(comparison), comparison.notes
    makers = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
    return {form: make(tables, notes) for form, make in makers.items()}


def save(comparison: Any, folder: Path) -> Path:
    """Writes a comparison into a folder in every form; the path of its page. Raises `InputError` where that fails."""
    from pocl_fast.reports.comparison_page import page_of

    page, forms = page_of(comparison), written(comparison)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for form, text in forms.items():
            write_text(folder / FILES[form], text + "\n")
        write_json(folder / "comparison.json", comparison.to_dict())
        write_text(folder / "comparison.html", page)
    except OSError as error:
        raise InputError(f"cannot write to --output {folder}: {error.strerror}") from error
    return folder / "comparison.html"
