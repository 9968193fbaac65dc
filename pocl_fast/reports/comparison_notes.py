"""What a reader of a comparison must know, in sentences: what intervals are over, unequal budgets, what was left out.

Knows methods and their runs. Does not know their means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocl_fast.reports.compared_methods import Method
from pocl_fast.reports.compared_runs import BY_TOKEN, ComparedRun

_NAMES = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "cross_entropy": "cross-entropy", "mean_kl": "mean KL"}


def notes_on(methods: Sequence[Method], shared: Sequence[str], resamples: int) -> list[str]:
    """The notes on methods that are compared on these sets, by their fingerprints."""
    runs = [run for method in methods for run in method.runs]
    return [
        *_of_intervals(methods),
        *_of_pairs(methods, len(shared), resamples),
        *_of_budgets(methods),
        *_of_groups(methods),
        *_of_weights(runs, shared),
        *_of_sets(runs, shared),
        *(note for one in shared for note in _of_metrics(methods, one)),
        *_of_teachers(runs),
    ]


def _of_intervals(methods: Sequence[Method]) -> list[str]:
    several = [method for method in methods if len(method.runs) > 1]
    single = [method for method in methods if len(method.runs) == 1]
    notes = []
    if several:
        counts = sorted({len(method.runs) for method in several})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        notes.append(f"[low, high] is the 95 % interval over {n} training seeds, by Student's t.")
    if single:
        who = "Each method" if not several else _named(single)
        verb = "has" if not several or len(single) == 1 else "have"
        notes.append(
            f"{who} {verb} one seed: no interval over training seeds. [low, high]† is a 95 % bootstrap over the samples"
            " alone: neither it nor a difference says what another training of it would do."
        )
    return notes


def _of_pairs(methods: Sequence[Method], sets: int, resamples: int) -> list[str]:
    if len(methods) < 2:
        return ["There is one method alone, so there is no pair to compare."]
    pairs = len(methods) * (len(methods) - 1) // 2
    drawn = f"{resamples:,} resamples of the samples, the same ones for both methods"
    if any(len(method.runs) > 1 for method in methods):
        drawn += ", and what other training seeds would change, from the spread over those of each method"
    notes = [f"Differences are from a paired bootstrap: {drawn}. p is two-sided."]
    if pairs > 1:
        notes.append(
            f"{pairs:,} pairs are compared on {_some(sets, 'set')}. Holm's p is adjusted over these pairs, for each set"
            " and metric apart."
        )
    adjusted = "Holm's p" if pairs > 1 else "p"
    notes.append(f"* marks the best mean, and those whose difference from it is not significant ({adjusted} ≥ 0.05).")
    return notes


def _of_budgets(methods: Sequence[Method]) -> list[str]:
    steps = {method.label: sorted({run.steps for run in method.runs if run.steps is not None}) for method in methods}
    unknown = sum(run.steps is None for method in methods for run in method.runs)
    notes = []
    if len({step for known in steps.values() for step in known}) > 1:
        said = ", ".join(f"{label} {_range(known)}" for label, known in steps.items() if known)
        notes.append(f"The budgets are not equal. Optimizer steps: {said}.")
    if unknown:
        notes.append(f"{_some(unknown, 'run')} without metrics.jsonl: the optimizer steps are not known.")
    return notes


def _of_groups(methods: Sequence[Method]) -> list[str]:
    notes = []
    for method in methods:
        if method.differing:
            said = ", ".join(f"{name} ({', '.join(values)})" for name, values in method.differing.items())
            notes.append(f"{method.label}: its runs differ in more than the seed: {said}.")
        if len(set(method.seeds)) < len(method.seeds):
            notes.append(
                f"{method.label}: {len(method.runs)} runs have {_some(len(set(method.seeds)), 'training seed')}"
                " between them; the interval is over the runs."
            )
    return notes


def _of_weights(runs: Sequence[ComparedRun], shared: Sequence[str]) -> list[str]:
    chosen = [runs[0].sets[one].name for one in shared if any(run.sets[one].chooses_weights for run in runs)]
    if not chosen:
        return []
    verb = "has" if len(chosen) == 1 else "have"
    return [
        f"{', '.join(chosen)} {verb} chosen weights during training, so scores there are better than on samples that"
        " chose none."
    ]


def _of_sets(runs: Sequence[ComparedRun], shared: Sequence[str]) -> list[str]:
    left_out: dict[str, int] = {}
    names: dict[str, str] = {}
    for run in runs:
        for fingerprint, one in run.sets.items():
            if fingerprint not in shared:
                left_out[fingerprint] = left_out.get(fingerprint, 0) + 1
                names[fingerprint] = f"{one.name} ({one.samples:,} samples, fingerprint {fingerprint[:8]})"
    if not left_out:
        return []
    said = ", ".join(f"{names[one]} in {count}" for one, count in left_out.items())
    sets = "set that is" if len(left_out) == 1 else "sets that are"
    return [f"Left out: {len(left_out)} {sets} not scored in all {len(runs)} runs: {said}."]


def _of_metrics(methods: Sequence[Method], fingerprint: str) -> list[str]:
    sets = [run.sets[fingerprint] for method in methods for run in method.runs]
    tokens = [one.tokens for one in sets]
    notes = []
    if any(not np.array_equal(one, tokens[0]) for one in tokens):
        counts = _range(sorted({int(one.sum()) for one in tokens}))
        notes.append(
            f"{sets[0].name}: the references have {counts} tokens, by different tokenizers or limits, so nats a token"
            " are of different tokens: cross-entropy and mean KL are not compared."
        )
    for metric, name in _NAMES.items():
        without = [m for m in methods if any(metric not in run.sets[fingerprint].values for run in m.runs)]
        if without and not (notes and metric in BY_TOKEN):
            why = "its runs have none, or not of every sample"
            notes.append(f"{sets[0].name}: no {name} of {_named(without)}: {why}.")
    return notes


def _of_teachers(runs: Sequence[ComparedRun]) -> list[str]:
    teachers = {run.teacher for run in runs if run.teacher is not None}
    if len(teachers) < 2:
        return []
    return [f"The runs have {len(teachers)} teachers: mean KL is to each run's own."]


def _named(methods: Sequence[Method]) -> str:
    *first, last = [method.label for method in methods]
    return f"{', '.join(first)} and {last}" if first else last


def _range(counts: Sequence[int]) -> str:
    if len(counts) == 1:
        return f"{counts[0]:,}"
    return f"{counts[0]:,} to {counts[-1]:,}"


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
