"""README.md, CHANGELOG.md and docs/: lines are short, links and paths lead somewhere, options exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from pocl_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FOLDERS = ("pocl_fast", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")


def outside_code(page: Path) -> list[tuple[int, str]]:
    """The numbered lines of a page that are in no block of code."""
    lines, code = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith("    "):
            lines.append((number, line))
    assert not code, f"{page.name}: a block of code does not end"
    return lines


def spans(page: Path) -> list[tuple[int, str]]:
    """What stands between backticks, with its line's number."""
    return [(number, span) for number, line in outside_code(page) for span in re.findall(r"`([^`]+)`", line)]


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@each_page
def test_no_line_is_longer_than_100_characters(page):
    long = [
        f"{page.name}, line {number}: {len(line)} characters"
        for number, line in outside_code(page)
        if len(line) > 100 and not line.startswith(("|", "#")) and "](http" not in line and "](#" not in line
    ]
    assert long == []


def test_the_architecture_lists_every_module_of_every_room_and_no_other():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = dict(re.findall(r"^### `pocl_fast/(\w+)`\n(.*?)(?=^### )", text, flags=re.MULTILINE | re.DOTALL))
    listed = {
        f"{room}/{name}"
        for room, section in rooms.items()
        for first in re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", first)
    }
    modules = {path for path in (ROOT / "pocl_fast").glob("*/*.py") if path.parent.name != "kernels"}
    there = {f"{path.parent.name}/{path.stem}" for path in modules if path.stem != "__init__"}
    assert listed == there


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@each_page
def test_every_link_leads_to_a_file_or_a_heading(page):
    wrong = []
    text = "\n".join(line for _, line in outside_code(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, part = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif part and part not in {anchor(line.lstrip("#")) for _, line in outside_code(file) if line[:1] == "#"}:
            wrong.append(f"{target}: no such heading")
    assert wrong == []


@each_page
def test_every_path_in_backticks_exists(page):
    """From the root, or within pocl_fast; a name with a star, a capital letter or `...` is a pattern."""
    wrong = []
    for number, span in spans(page):
        for path in re.findall(r"(?<![\w./-])[\w.-]+/[\w./-]+", span):
            known = path.split("/")[0] in FOLDERS or re.search(r"\.(py|cpp|h|sh|md|toml)$", path)
            if known and not any((root / path).exists() for root in (ROOT, ROOT / "pocl_fast")):
                wrong.append(f"line {number}: {path}")
    assert wrong == []


@each_page
def test_every_module_in_backticks_exists(page):
    wrong = []
    for number, span in spans(page):
        for name in re.findall(r"\bpocl_fast(?:\.\w+)+", span):
            module, _, last = name.rpartition(".")
            if not found(name) and not hasattr(importlib.import_module(module), last):
                wrong.append(f"line {number}: {name}")
    assert wrong == []


def found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def options():
    """Every option of these commands, as their help names them."""
    import contextlib
    import io

    said = io.StringIO()
    for words in (["distill"], ["sft"], ["plan"], ["inspect"], ["compare"], ["evaluate", "--predictions"]):
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            main([*words, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", said.getvalue()))


@each_page
def test_every_option_in_backticks_exists(page, options):
    assert len(options) > 50
    if page.name == "benchmarks.md":  # options of its scripts
        return
    wrong = [
        f"line {number}: {name}"
        for number, span in spans(page)
        if span.startswith(("--", "pocl-fast"))
        for name in re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", span)
        if name not in options
    ]
    assert wrong == []
