"""The scores of a run for a person: a table a set, and the answers that training changed most.

Knows evaluation.json and the tables of scores. Does not know how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pocl_fast.answers.sample_scores import score_file

# key -> heading, in the order of columns
MOMENTS = {"before": "before", "warmed": "warmed up", "after": "after", "teacher": "teacher"}
ALWAYS = ("before", "after")  # whose columns are there before they have scores
SHOWN = 4  # answers that got better, and as many that got worse
# name -> key, form of a value; an interval has the key and form of the value
_SCORES = {
    "ROUGE-L, 0 to 100": ("rouge_l", "{:.2f}"),
    "exact match, %": ("exact_match", "{:.1f}"),
    "cross-entropy, nats a token": ("cross_entropy", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "KL(teacher || student)": ("mean_kl", "{:.3f}"),
}
INTERVAL = "  95 % interval"


@dataclass(frozen=True)
class ScoreRow:
    """A score at each moment, as text; a dash where there is none."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class SetScores:
    """All scores on one set."""

    title: str  # which set, and what its scores are
    columns: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    note: str  # what the numbers are of


@dataclass(frozen=True)
class AnswerRow:
    """The answers to one prompt of a set before and after training, and by how much their ROUGE-L changed."""

    change: str
    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class ChangedAnswers:
    """The answers to a set's prompts that training made better and worse by most."""

    name: str
    improved: tuple[AnswerRow, ...]
    worsened: tuple[AnswerRow, ...]


def score_tables(run: Path) -> list[SetScores]:
    """A table for each set that was scored."""
    return [_table(name, one) for name, one in _sets(run).items()]


def text_lines(run: Path) -> list[str]:
    """The same for a terminal."""
    lines = []
    for table in score_tables(run):
        lines += [table.title, f"{'':<28}" + "".join(f"{column:>17}" for column in table.columns)]
        lines += [f"{row.name:<28}" + "".join(f"{cell:>17}" for cell in row.cells) for row in table.rows]
        lines += [table.note, ""]
    return lines


def changed_answers(run: Path) -> list[ChangedAnswers]:
    """The most improved and the most worsened answers of each set, where it was scored before and after training."""
    found = []
    for name in _sets(run):
        paths = [score_file(run, name, when) for when in ALWAYS]
        if not all(path.exists() for path in paths):
            continue
        before, after = (pq.read_table(path).to_pylist() for path in paths)
        if [_asked(one) for one in before] == [_asked(one) for one in after]:  # else one of them is to be done again
            found.append(_changed(name, before, after))
    return found


def _sets(run: Path) -> dict[str, Any]:
    path = run / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8"))["sets"] if path.exists() else {}  # type: ignore[no-any-return]


def _table(name: str, one: Mapping[str, Any]) -> SetScores:
    scores = one["scores"]
    moments = [when for when in MOMENTS if when in scores or when in ALWAYS]
    known = [scores.get(when) for when in moments]
    rows = []
    for label, (key, form) in _SCORES.items():
        if any(of and of[key] is not None for of in known):
            rows.append(ScoreRow(label, tuple(_cell(of, key, form) for of in known)))
        if any(of and of.get(f"{key}_interval") for of in known):
            rows.append(ScoreRow(INTERVAL, tuple(_interval(of, key, form) for of in known)))
    return SetScores(_title(name, one), tuple(MOMENTS[when] for when in moments), tuple(rows), _note(scores))


def _title(name: str, one: Mapping[str, Any]) -> str:
    """Which set, and what its scores are: those that training chose by are no estimate for other samples."""
    role = one["role"]
    which = f"{role} set" if name == role else f"{role} set {name}"
    use = "chose nothing"
    if one["chooses_weights"]:
        use = f"scores that {'chose' if 'after' in one['scores'] else 'choose'} the weights"
    return f"{which}, {one['samples']:,} samples: {use}"


def _note(scores: Mapping[str, Any]) -> str:
    first = next(iter(scores.values()))
    seeds = len(first["seeds"])
    spread = (
        f"{seeds} answers a sample; ± is the spread over the seeds" if seeds > 1 else "one seed: no spread over seeds"
    )
    return f"{spread}, {'intervals are over samples' if first['rouge_l_interval'] else 'one sample: no interval'}"


def _cell(scores: Mapping[str, Any] | None, key: str, form: str) -> str:
    if scores is None or scores[key] is None:
        return "-"
    spread = f" ± {scores['rouge_l_spread']:.2f}" if key == "rouge_l" and len(scores["seeds"]) > 1 else ""
    return form.format(scores[key]) + spread


def _interval(scores: Mapping[str, Any] | None, key: str, form: str) -> str:
    interval = scores and scores[f"{key}_interval"]
    return " to ".join(form.format(round(bound, 9) + 0.0) for bound in interval) if interval else "-"


def _asked(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["line"], row["prompt"], row["references"]


def _changed(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> ChangedAnswers:
    change = np.array([np.mean(b["rouge_l"]) - np.mean(a["rouge_l"]) for a, b in zip(before, after, strict=True)])
    order = np.argsort(change, kind="stable")
    worst = [i for i in order[:SHOWN] if change[i] < 0]
    best = [i for i in order[::-1][:SHOWN] if change[i] > 0]
    improved, worsened = (tuple(_row(change[i], before[i], after[i]) for i in some) for some in (best, worst))
    return ChangedAnswers(name, improved, worsened)


def _row(change: float, before: dict[str, Any], after: dict[str, Any]) -> AnswerRow:
    answers = before["answers"][0], after["answers"][0]
    return AnswerRow(f"{change:+.1f}", before["prompt"], before["references"][0], *answers)
