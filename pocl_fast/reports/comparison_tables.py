"""A comparison as tables. Computes no statistics, and does not know how a table is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_fast.reports.compared_methods import Method
from pocl_fast.reports.comparison import METRICS, Comparison, Metric, Pair, Score, SetComparison

_PAIRS = 45  # of 10 methods: of more pairs those that differ are listed
LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `strong` ones are bold where there is bold."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a line of heads. Its first `words` columns are text, the others figures, of which so many belong
    `together`."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int
    note: str = ""
    together: int = 1


def tables_of(comparison: Comparison, *, all_pairs: bool = False) -> list[Table]:
    """The tables of a comparison: methods, data sets, a table of scores and one of differences for each metric. Of many
    pairs those that differ on a set, with a note that says how many there are, unless `all_pairs` are asked for."""
    metrics = [metric for metric in METRICS if any(metric.key in one.scores for one in comparison.sets)]
    scores = [_scores(comparison, metric) for metric in metrics]
    pairs = [_differences(comparison, metric, all_pairs) for metric in metrics]
    return [_methods(comparison), _sets(comparison.sets), *scores, *(table for table in pairs if table is not None)]


def score_text(score: Score | None, metric: Metric) -> str:
    """ "29.10 [27.90, 30.30]", with † where the interval is over samples, * behind the best."""
    if score is None:
        return "-"
    interval = _interval(score.low, score.high, metric)
    return f"{score.mean:.{metric.digits}f}{interval}" + ("†" if score.over == "samples" else "") + "*" * score.best


def p_text(p: float | None) -> str:
    """A p value to three decimals."""
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _methods(comparison: Comparison) -> Table:
    rows = [
        (Cell(method.label), Cell(method.name), *map(Cell, (_seeds(method), _steps(method), _minutes(method))))
        for method in comparison.methods
    ]
    return Table("Methods", ("", "method", "training seeds", "optimizer steps", "minutes a run"), tuple(rows), 2)


def _sets(sets: Sequence[SetComparison]) -> Table:
    rows = []
    for one in sets:
        role = one.role + (", chose weights" if one.chooses_weights else "")
        rows.append((Cell(one.name), Cell(one.source), Cell(role), Cell(f"{one.samples:,}")))
    return Table("Data sets", ("set", "source", "role", "samples"), tuple(rows), 3)


def _scores(comparison: Comparison, metric: Metric) -> Table:
    sets = [one for one in comparison.sets if metric.key in one.scores]
    rows = []
    for place, method in enumerate(comparison.methods):
        scores = [one.scores[metric.key][place] for one in sets]
        cells = [Cell(score_text(score, metric), score is not None and score.best) for score in scores]
        rows.append((Cell(method.label), Cell(method.name), *cells))
    for name, of in (("student before training", "before"), ("teacher", "teacher")):
        ranges = [getattr(one, of).get(metric.key) for one in sets]
        if any(one is not None for one in ranges):
            rows.append((Cell(""), Cell(name), *(Cell(_span(one, metric)) for one in ranges)))
    return Table(_title(metric), ("", "method", *(one.name for one in sets)), tuple(rows), 2)


def _differences(comparison: Comparison, metric: Metric, all_pairs: bool) -> Table | None:
    sets = [one for one in comparison.sets if one.pairs.get(metric.key)]
    found: dict[tuple[int, int], dict[str, Pair]] = {
        (pair.first, pair.second): {} for one in sets for pair in one.pairs[metric.key]
    }
    for one in sets:
        for pair in one.pairs[metric.key]:
            found[pair.first, pair.second][one.name] = pair
    if not found:
        return None
    several = len(found) > 1
    heads = ["pair"]
    for one in sets:
        heads += [one.name, "p", *(["Holm's p"] if several else [])]
    kept = found
    note = ""
    if len(found) > _PAIRS and not all_pairs:
        kept = {key: pairs for key, pairs in found.items() if any(_significant(pair) for pair in pairs.values())}
        note = f"{len(kept):,} of {len(found):,} pairs: those with Holm's p < {LEVEL} on a set. The page has all."
    rows = []
    for (first, second), pairs in sorted(kept.items()):
        row = [Cell(f"{comparison.methods[first].label} − {comparison.methods[second].label}")]
        for one in sets:
            row += _pair_cells(pairs.get(one.name), metric, several)
        rows.append(tuple(row))
    return Table(f"Differences of {_title(metric)}", tuple(heads), tuple(rows), 1, note, 2 + several)


def _pair_cells(pair: Pair | None, metric: Metric, several: bool) -> list[Cell]:
    if pair is None:
        return [Cell("-")] * (2 + several)
    text = _signed(f"{pair.difference:+.{metric.digits}f}{_interval(pair.low, pair.high, metric)}")
    cells = [Cell(text, _significant(pair)), Cell(p_text(pair.p))]
    return [*cells, Cell(p_text(pair.adjusted_p))] if several else cells


def _significant(pair: Pair) -> bool:
    return pair.adjusted_p is not None and pair.adjusted_p < LEVEL


def _title(metric: Metric) -> str:
    return f"{metric.name} ({metric.unit}; {'higher' if metric.high_is_better else 'lower'} is better)"


def _interval(low: float | None, high: float | None, metric: Metric) -> str:
    if low is None or high is None:
        return ""
    return _signed(f" [{low:.{metric.digits}f}, {high:.{metric.digits}f}]")


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _span(span: tuple[float, float] | None, metric: Metric) -> str:
    """A score that all runs share, or from where to where theirs are."""
    if span is None:
        return "-"
    low, high = (f"{value:.{metric.digits}f}" for value in span)
    return low if low == high else f"{low} to {high}"


def _seeds(method: Method) -> str:
    seeds = [str(seed) for seed in method.seeds]
    return " ".join(seeds) if len(seeds) <= 5 else f"{len(seeds)}: {seeds[0]} ... {seeds[-1]}"


def _steps(method: Method) -> str:
    known = sorted({run.steps for run in method.runs if run.steps is not None})
    if not known:
        return "-"
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _minutes(method: Method) -> str:
    """Of training: of one run, or the mean of several."""
    known = [run.seconds for run in method.runs if run.seconds is not None]
    return f"{sum(known) / len(known) / 60:,.1f}" if known else "-"
