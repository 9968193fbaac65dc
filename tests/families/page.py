"""What came out of the matrix: as a table for the terminal, and as docs/families.md. Knows outcomes, but no model."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

COLUMNS = ("logits", "loss", "teacher", "answers", "cut", "reload", "lora")
LEFT_OUT = "left out"


class Outcome(NamedTuple):
    """How a family is run in a cell: "packed", "padded", "good", "refused" or "WRONG"; and what was said of it."""

    result: str
    said: str = ""


Results = Mapping[str, Mapping[str, Outcome]]  # by row and column

HEAD = """\
# Model families

<!-- written by `make families-page` from a run of tests/families -->

Tiny models of every family that transformers {version} makes a causal language model of, and of some
variants, were run by pocl-fast on a CPU in fp32. Each number was compared with transformers' own
eager attention, each sample by itself: a difference over 1e-4 of the norm counts as wrong. The
models have random weights, samples longer than every window and chunk, and multipliers and caps
that are not 1.

| column | what is compared |
|---|---|
| logits | those of a batch, packed or padded |
| student | loss (cross-entropy and KL) and gradient of a training step |
| teacher | loss and gradient from the teacher's cache |
| answers | greedy answers in batches: lengths, early ends, common beginnings |
| cut | half of the layers, against the whole model without the others |
| reload | a trained student, saved and read by transformers |
| LoRA | loss and gradient of adapters |

*packed* batches have no padding. *padded* ones are as right, and slower. A number is a reason at
the end of the page for which pocl-fast refuses the family, in one error before a model is trained.

"""
SHOWN = {"good": "yes"}


def table(results: Results) -> str:
    """A line a row, for the terminal."""
    width = max(map(len, results), default=0)
    lines = [" ".join([" " * width, *(f"{column:8}" for column in COLUMNS)]).rstrip()]
    for row in sorted(results):
        cells = results[row]
        if LEFT_OUT in cells:
            continue
        shown = (cells[column].result if column in cells else "-" for column in COLUMNS)
        lines.append(" ".join([f"{row:{width}}", *(f"{cell:8}" for cell in shown)]).rstrip())
    lines += [
        f"{row:{width}} not built tiny: {cells[LEFT_OUT].result}" for row, cells in results.items() if LEFT_OUT in cells
    ]
    return "\n".join(lines)


def wrong_cells(results: Results) -> str:
    """A line a cell that is wrong, with what was raised."""
    return "\n".join(
        f"{row} {column}: {outcome.said[:200]}"
        for row, cells in sorted(results.items())
        for column, outcome in cells.items()
        if outcome.result == "WRONG"
    )


def counts(results: Results) -> str:
    """How many cells there are of each outcome."""
    found: dict[str, int] = {}
    for cells in results.values():
        for column, outcome in cells.items():
            if column != LEFT_OUT:
                found[outcome.result] = found.get(outcome.result, 0) + 1
    return ", ".join(f"{count} {result}" for result, count in sorted(found.items(), key=lambda item: -item[1]))


def page(results: Results, version: str) -> str:
    """docs/families.md as text."""
    reasons: list[str] = []
    lines = [HEAD.format(version=version).rstrip("\n"), ""]
    lines += [
        "| family | logits | student | teacher | answers | cut | reload | LoRA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(results):
        if LEFT_OUT not in results[row]:
            shown = [_shown(row, results[row].get(column), reasons) for column in COLUMNS]
            lines.append(f"| {row} | {' | '.join(shown)} |")
    lines += ["", "## Why a family is refused", ""]
    lines += [textwrap.fill(f"{i}. {reason}", 100, subsequent_indent="   ") for i, reason in enumerate(reasons, 1)]
    lines += [
        "",
        "## Not tried",
        "",
        "These cannot be built small from their configuration, or do not run on tokens alone:",
        "",
    ]
    for row in sorted(results):
        if LEFT_OUT in results[row]:
            lines.append(textwrap.fill(f"- {row}: {results[row][LEFT_OUT].result}", 100, subsequent_indent="  "))
    return "\n".join(lines) + "\n"


def _shown(row: str, outcome: Outcome | None, reasons: list[str]) -> str:
    if outcome is None:
        return "-"
    if outcome.result != "refused":
        return SHOWN.get(outcome.result, outcome.result)
    reason = _without_names(outcome.said)
    if reason not in reasons:
        reasons.append(reason)
    return str(reasons.index(reason) + 1)


def _without_names(said: str) -> str:
    """A refusal without the name of the model's class and without figures, so that one reason has one number."""
    words = re.sub(r"\b[A-Z]\w*(?:For\w+|LMHead\w*|Decoder|Model)\b", "the model", " ".join(said.split()))
    words = re.sub(r"^(student|teacher) the model", "the model", words)
    return re.sub(r"[\d.]+(e[+-]\d+)? of the largest", "much of the largest", words)
