"""Methods compared on the data sets that all their runs were scored on: means, intervals, differences, and what to know
about them.

Knows runs and statistics. Does not know how a comparison is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocl_fast.answers.intervals import bootstrap_interval, mean_interval, paired_bootstraps
from pocl_fast.reports.compared_methods import Method, grouped, named
from pocl_fast.reports.compared_runs import BY_TOKEN, ComparedRun, SetScores, read_run
from pocl_fast.reports.comparison_notes import notes_on
from pocl_fast.system.errors import InputError

RESAMPLES = 10_000
_A_PAIR = 200  # resamples for each pair: p is at least 2 / resamples, so that Holm's p can be as low as 0.01
LEVEL = 0.95


@dataclass(frozen=True)
class Metric:
    """A score that is compared."""

    key: str
    name: str
    unit: str
    digits: int
    high_is_better: bool


METRICS = (
    Metric("rouge_l", "ROUGE-L of sampled answers", "0 to 100", 2, True),
    Metric("exact_match", "exact match", "%", 2, True),
    Metric("cross_entropy", "cross-entropy", "nats a token", 3, False),
    Metric("mean_kl", "mean KL to the teacher", "nats a token", 3, False),
)


@dataclass(frozen=True)
class Score:
    """A method's score on a set: the mean over its runs, and its interval, which is over the training seeds, or of one
    run over the samples. No bounds where there is but one sample too."""

    mean: float
    low: float | None
    high: float | None
    over: str  # "training seeds" or "samples"
    best: bool  # the best mean, or not significantly worse than that


@dataclass(frozen=True)
class Pair:
    """The score of one method less that of another, by their places; its interval and p of a paired bootstrap, and p
    adjusted by Holm's rule over all pairs of this set and metric. None where there is but one sample."""

    first: int
    second: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    adjusted_p: float | None


@dataclass(frozen=True)
class SetComparison:
    """All methods on one data set. By metric: a score a method, None where it has none, and the pairs that have one."""

    name: str
    role: str
    chooses_weights: bool  # in any of the runs
    source: str
    samples: int
    scores: dict[str, list[Score | None]]
    pairs: dict[str, list[Pair]]
    before: dict[str, tuple[float, float]]  # least and most over the runs, of the student as it was given
    teacher: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Methods compared, by their places; `notes` say in words what the figures are of and what was left out."""

    methods: list[Method]
    sets: list[SetComparison]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, in JSON's types."""
        methods = [
            {
                "label": method.label,
                "name": method.name,
                "runs": [
                    {"folder": str(run.path), "seed": run.seed, "steps": run.steps, "seconds": run.seconds}
                    for run in method.runs
                ],
            }
            for method in self.methods
        ]
        return {"methods": methods, "sets": [asdict(one) for one in self.sets], "notes": self.notes}


def compare_runs(
    runs: Sequence[Path | str] | Mapping[str, Sequence[Path | str]],
    names: Sequence[str] = (),
    *,
    resamples: int | None = None,
) -> Comparison:
    """Compares run directories, of which those that differ in the training seed alone are one method; or the methods
    of a dict, name -> folders. `names` are one a method, or one a run where runs of one name are a method. `resamples`
    are 10,000, and more where there are so many pairs that an adjusted p could not be small otherwise.

    Only sets that all runs were scored on are compared: the same samples, whatever the sets are called. Raises
    `InputError` for fewer than two runs, a folder that is no evaluated run, a run that is given twice, runs that were
    evaluated in different ways, and runs without a set in common.
    """
    if isinstance(runs, Mapping):
        methods = named({name: [read_run(Path(path)) for path in group] for name, group in runs.items()})
    else:
        if len(runs) < 2:
            alone = f", got {runs[0]} alone (`pocl-fast report` shows one run)" if runs else ""
            raise InputError(f"give two or more run directories to compare{alone}")
        methods = grouped([read_run(Path(path)) for path in runs], list(names))
    every = [run for method in methods for run in method.runs]
    if len(every) < 2:
        raise InputError("give two or more run directories to compare")
    _check_evaluated_alike(every)
    shared = shared_sets(every)
    if resamples is None:
        resamples = max(RESAMPLES, _A_PAIR * math.comb(len(methods), 2))
    sets = [_compared(methods, fingerprint, resamples) for fingerprint in shared]
    return Comparison(methods, sets, notes_on(methods, shared, resamples))


def shared_sets(runs: Sequence[ComparedRun]) -> list[str]:
    """The fingerprints of the sets that all runs were scored on, test sets first and those that chose weights last.
    Raises `InputError` for none."""
    shared = [one for one in runs[0].sets if all(one in run.sets for run in runs)]
    if not shared:
        held = "; ".join(f"{run.path} has {_sets_of(run)}" for run in runs[:4]) + ("; ..." if len(runs) > 4 else "")
        raise InputError(
            f"no data set is scored in all {len(runs)} runs, and sets are told apart by their samples, not their"
            f" names: {held}. Evaluate them on the same file: `pocl-fast evaluate --output RUN --restart`"
        )
    first = runs[0].sets
    return sorted(shared, key=lambda one: (first[one].role != "test", first[one].chooses_weights))


def scores_on(methods: Sequence[Method], fingerprint: str) -> list[list[SetScores]]:
    """The scores of each method's runs on a set. Raises `InputError` where a run's are of other samples than its
    fingerprint says."""
    first = methods[0].runs[0]
    for run in (run for method in methods for run in method.runs):
        one = run.sets[fingerprint]
        if one.prompts != first.sets[fingerprint].prompts:
            raise InputError(
                f"{run.path}: the scores by sample of {one.name} are of other samples than those of {first.path},"
                f" though evaluation.json says the same; run `pocl-fast evaluate --output {run.path} --restart`"
            )
    return [[run.sets[fingerprint] for run in method.runs] for method in methods]


def linearised(scores: SetScores, metric: str) -> np.ndarray:
    """[samples]: values whose plain mean is the metric's mean, so that all metrics are resampled alike.

    A mean over tokens is a quotient of two sums. Each sample's value is the mean, and what the sample adds to it to
    first order: n w (v - mean) / sum(w) (the delta method; Efron & Tibshirani 1993, chapter 21).
    """
    values, weights = scores.values[metric], scores.weights(metric)
    if weights is None:
        return values
    mean = scores.mean(metric)
    return mean + len(values) * weights * (values - mean) / weights.sum()


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, by Holm's step-down rule (Holm 1979): the share of families of comparisons
    with any false finding stays below the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _compared(methods: Sequence[Method], fingerprint: str, resamples: int) -> SetComparison:
    scored = scores_on(methods, fingerprint)
    every = [one for runs in scored for one in runs]
    comparable = [metric for metric in METRICS if metric.key not in BY_TOKEN or _same_tokens(every)]
    scores: dict[str, list[Score | None]] = {}
    pairs: dict[str, list[Pair]] = {}
    for metric in comparable:
        has = [place for place, runs in enumerate(scored) if all(metric.key in run.values for run in runs)]
        if has:
            pairs[metric.key] = _pairs(scored, has, metric, resamples)
            best = _best(scored, has, metric, pairs[metric.key])
            scores[metric.key] = [
                _score(runs, metric, place in best, resamples) if place in has else None
                for place, runs in enumerate(scored)
            ]
    first = every[0]
    return SetComparison(
        name=first.name,
        role=first.role,
        chooses_weights=any(one.chooses_weights for one in every),
        source=first.source,
        samples=first.samples,
        scores=scores,
        pairs=pairs,
        before=_ranges([one.before for one in every]),
        teacher=_ranges([one.teacher for one in every]),
    )


def _score(runs: Sequence[SetScores], metric: Metric, best: bool, resamples: int) -> Score:
    if len(runs) > 1:
        return Score(*mean_interval([run.mean(metric.key) for run in runs], LEVEL), "training seeds", best)
    [run] = runs
    interval = bootstrap_interval(run.values[metric.key], LEVEL, resamples, weights=run.weights(metric.key))
    return Score(*interval, "samples", best)


def _pairs(scored: Sequence[Sequence[SetScores]], has: Sequence[int], metric: Metric, resamples: int) -> list[Pair]:
    models = [np.stack([linearised(run, metric.key) for run in scored[place]]) for place in has]
    found = paired_bootstraps(models, LEVEL, resamples)
    p_values = [one.p for one in found.values() if one.p is not None]
    adjusted: Sequence[float | None] = holm(p_values) if len(p_values) == len(found) else [None] * len(found)
    return [
        Pair(has[first], has[second], one.mean, one.low, one.high, one.p, holm_p)
        for ((first, second), one), holm_p in zip(found.items(), adjusted, strict=True)
    ]


def _best(scored: Sequence[Sequence[SetScores]], has: Sequence[int], metric: Metric, pairs: Sequence[Pair]) -> set[int]:
    """The places of the method with the best mean, and of those whose difference from it is not significant. None of
    one method alone."""
    if len(has) < 2:
        return set()
    means = {place: float(np.mean([run.mean(metric.key) for run in scored[place]])) for place in has}
    best = (max if metric.high_is_better else min)(means, key=means.__getitem__)
    against = [pair for pair in pairs if best in (pair.first, pair.second)]
    close = [pair for pair in against if pair.adjusted_p is not None and pair.adjusted_p >= 1 - LEVEL]
    return {best} | {place for pair in close for place in (pair.first, pair.second)}


def _same_tokens(scores: Sequence[SetScores]) -> bool:
    return all(np.array_equal(one.tokens, scores[0].tokens) for one in scores)


def _ranges(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """The least and the most of each metric that all have."""
    shared = [metric.key for metric in METRICS if all(metric.key in one for one in scores)]
    return {key: (min(one[key] for one in scores), max(one[key] for one in scores)) for key in shared}


def _check_evaluated_alike(runs: Sequence[ComparedRun]) -> None:
    for option, first in runs[0].evaluated.items():
        other = next((run for run in runs if run.evaluated[option] != first), None)
        if other is not None:
            flag = "--" + option.replace("_", "-")
            values = " and ".join(f"{_words(run.evaluated[option])} in {run.path}" for run in (runs[0], other))
            raise InputError(
                f"the runs were evaluated in different ways: {flag} is {values}; evaluate one of them again:"
                f" `pocl-fast evaluate --output {other.path} --restart {flag} {_words(first)}`"
            )


def _sets_of(run: ComparedRun) -> str:
    return ", ".join(
        f"{one.name} ({one.samples:,} samples of {one.source}, fingerprint {one.fingerprint[:8]})"
        for one in run.sets.values()
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
