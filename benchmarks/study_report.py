"""Makes the tables of docs/study.md out of the folder of benchmarks/study.py.

    python benchmarks/study_report.py FOLDER [FOLDER ...] [--page docs/study.md]

Without --page the tables are printed. With it they take the place of what stands between the page's two marks. A
difference is tested by a paired bootstrap: held-out samples are drawn anew, the same for both methods, and training
seeds of each. p-values of a table are Holm's.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from study import read_setup
from study_cells import WITHOUT_ORDER
from table_form import markdown

from pocl_fast.answers.intervals import mean_interval, paired_bootstrap
from pocl_fast.reports.comparison import holm
from pocl_fast.system.files import write_text

BEGIN, END = "<!-- tables: made by benchmarks/study_report.py -->", "<!-- end of the tables -->"
METRICS = {"rouge_l": ("ROUGE-L", ".1f", 1), "cross_entropy": ("CE", ".3f", -1)}  # its name, form, which way is better


@dataclass(frozen=True)
class Trained:
    """One training of a study."""

    method: str
    part: str
    seed: int
    steps: int
    seconds: float
    tables: dict[str, dict[str, np.ndarray]]  # set -> column -> a value a sample


def read_study(folder: Path) -> list[Trained]:
    """Every training that is done."""
    made = []
    for path in sorted((folder / "runs").rglob("result.json")):
        known = json.loads(path.read_text(encoding="utf-8"))
        tables = {}
        for name in known["scores"]:
            table = pq.read_table(path.with_name(f"{name}.parquet"))
            tables[name] = {c: table[c].to_numpy() for c in ("rouge_l", "cross_entropy", "tokens")}
        made.append(Trained(known["method"], known["part"], known["seed"], known["steps"], known["seconds"], tables))
    return made


def by_method(trained: Iterable[Trained]) -> dict[str, list[Trained]]:
    groups: dict[str, list[Trained]] = defaultdict(list)
    for one in trained:
        groups[one.method].append(one)
    return groups


def mean_of(one: Trained, name: str, metric: str) -> float:
    table = one.tables[name]
    weights = table["tokens"] if metric == "cross_entropy" else None
    return float(np.average(table[metric], weights=weights))


def cell(runs: Sequence[Trained], name: str, metric: str, usual: int) -> str:
    """The mean over the training seeds, and its 95 % interval; how many they are where they are not `usual`."""
    form = METRICS[metric][1]
    mean, low, high = mean_interval([mean_of(one, name, metric) for one in runs])
    if len(runs) == 1:
        return f"{mean:{form}} (one seed)"
    many = "" if len(runs) == usual else f" ({len(runs)} seeds)"
    return f"{mean:{form}} ± {(high - low) / 2:{form}}{many}"


def difference(ours: Sequence[Trained], theirs: Sequence[Trained], name: str, metric: str) -> tuple[Any, ...]:
    """Mean difference with its interval and p; of cross-entropy a sample weighs as its tokens."""
    sides = [np.stack([one.tables[name][metric] for one in runs]) for runs in (ours, theirs)]
    weights = ours[0].tables[name]["tokens"] if metric == "cross_entropy" else None
    return tuple(paired_bootstrap(*sides, weights=weights))


def compared(groups: dict[str, list[Trained]], pairs: Sequence[tuple[str, str]], title: str, claim: str) -> str:
    """A table of methods against others: a row a pair, the scores of both and their difference on each set."""
    pairs = [(a, b) for a, b in pairs if a in groups and b in groups]
    if not pairs:
        return ""
    names = list(groups[pairs[0][0]][0].tables)
    tests = [(a, b, name, metric) for name in names for metric in METRICS for a, b in pairs]
    found = [difference(groups[a], groups[b], name, metric) for a, b, name, metric in tests]
    adjusted = holm([one[3] for one in found])
    seeds, rows = sorted({len(groups[method]) for pair in pairs for method in pair}), []
    for (a, b, name, metric), (mean, low, high, _), p in zip(tests, found, adjusted, strict=True):
        label, form, sign = METRICS[metric]
        verdict = "" if p >= 0.05 else ("better" if sign * mean > 0 else "worse")
        rows.append([name, label, a, cell(groups[a], name, metric, seeds[0]), b,
                     cell(groups[b], name, metric, seeds[0]),
                     f"{mean:+{form}} [{low:+{form}}, {high:+{form}}]", f"{p:.3f}", verdict])  # fmt: skip
    columns = ["held out", "", "method", "", "against", "", "difference [95 %]", "p", ""]
    steps = sorted({one.steps for pair in pairs for method in pair for one in groups[method]})
    note = f"Optimizer steps: {', '.join(map(str, steps))}; seeds a method: {' or '.join(map(str, seeds))}."
    return markdown({"title": title, "claim": claim, "columns": columns, "rows": rows, "note": note}, 3)


def tables_of(trained: Sequence[Trained]) -> str:
    """All tables of a study."""
    groups, parts = by_method(trained), {one.part for one in trained}
    objectives = [name.removesuffix(", pocl") for name in groups if name.endswith(", pocl")]
    against = [(f"{one}, pocl", f"{one}, {other}") for one in objectives for other in ("none", "random order")]
    baselines = [(f"{one}, none", "sft") for one in objectives] + [("sequence-level KD", "sft")]
    reference = "forward_kl, pocl"
    made = [
        compared(groups, against, "With the curriculum, and without", "The paper's curriculum."),
        compared(groups, baselines, "Distillation against fine-tuning", "No curriculum on either side."),
    ]
    if "parts" in parts:
        groups |= {"without the order": groups[WITHOUT_ORDER]} if WITHOUT_ORDER in groups else {}
        off = [(name, reference) for name in groups if name.startswith("without ")]
        made.append(compared(groups, off, "Each part of the curriculum switched off alone", "Forward KL."))
    if "pacing" in parts:
        pacings = sorted({one.method for one in trained if one.part == "pacing"})
        others = [(name, "forward_kl, none") for name in pacings]
        made.append(compared(groups, others, "Other pacings against none", "Forward KL, one cosine over all."))
        shuffled = [(name, f"{name}, random order") for name in pacings]
        made.append(compared(groups, shuffled, "What the order gives to a pacing", "Forward KL, one cosine over all."))
    for budget in sorted((part for part in parts if part.endswith(" passes")), key=lambda part: float(part.split()[0])):
        pairs = [(f"{kind}, {budget}", f"none, {budget}") for kind in ("pocl", "competence, early end")]
        made.append(compared(groups, pairs, f"{budget[0].upper()}{budget[1:]} over the samples", "Forward KL."))
    return "\n\n".join(table for table in made if table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    text = ""
    for folder in given.folders:
        trained = read_study(folder)
        if not trained:
            raise SystemExit(f"{folder} holds no training that is done: run benchmarks/study.py first")
        setup = read_setup(folder)
        source = "dolly_500" if setup.data else "the demo"
        of_budgets = all(one.part.endswith(" passes") for one in trained)
        text += f"## {setup.budget_samples if of_budgets else setup.train_samples} samples of {source}\n\n"
        text += f"{len(trained)} trainings in {setup.precision}.\n\n{tables_of(trained)}\n\n"
    if given.page is None:
        print(text)
        return
    page = given.page.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{given.page} lacks the marks {BEGIN!r} and {END!r}")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    write_text(given.page, f"{before}{BEGIN}\n\n{text.rstrip()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
