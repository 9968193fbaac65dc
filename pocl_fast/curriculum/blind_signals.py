"""Signals that tell little about the order of the samples: constant ones, ties, and those that no other agrees with.

Knows scores and the names of options. Does not know how scores are measured, nor who prints what is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocl_fast.curriculum.scores import SignalScores
from pocl_fast.curriculum.signals import Weighted

MOST = 0.5  # of the samples in one group of equal scores: a signal that ties more is named
LEAST_CORRELATION = 0.05
SAMPLED = 200_000  # samples for a correlation, whose error is then 0.002


@dataclass(frozen=True)
class SignalLine:
    """What is to be said of one signal, or of two that do not agree."""

    signals: tuple[str, ...]
    reason: Literal["constant", "tied", "missing", "uncorrelated"]
    text: str


@dataclass(frozen=True)
class Group:
    """Samples of one score; NaN is one too."""

    score: float
    samples: int


def signal_lines(known: SignalScores) -> list[SignalLine]:
    """A line for each signal that tells little, by the first of these that holds:

    - constant: all samples have one score, or none has any;
    - tied: the largest group of samples of one score (or without a score) is more than half of all. Small groups do
      not count, however many: a length in tokens ranks samples well;
    - uncorrelated: Spearman's rank correlation with every other signal is below 0.05, ties averaged, easy samples
      first in each. Constant signals are no others, and one that only tied signals are beside is not named.

    And one (missing) for a signal by which fewer samples have no score. Of a single sample nothing is said.
    """
    N = len(known.index)
    if N < 2:
        return []
    constant = set(known.constant())
    groups = {one.signal.name: largest_group(array) for one, array in zip(known.signals, known.scores, strict=True)}
    tied = {name for name, group in groups.items() if group.samples > MOST * N} - constant
    left = [one for one in known.signals if one.signal.name not in constant | tied]
    lines = []
    for one in known.signals:
        name = one.signal.name
        if name in constant | tied:
            reason: Literal["constant", "tied"] = "constant" if name in constant else "tied"
            lines.append(SignalLine((name,), reason, f"{_counted(name, groups[name], N)}{_advice(known, one, left)}"))
    for name, count in known.missing().items():
        if not np.isnan(groups[name].score) or name not in constant | tied:
            said = f"{name}: {count:,} of {N:,} samples have no score by it; they rank last by it"
            lines.append(SignalLine((name,), "missing", said))
    return lines + _uncorrelated(known, constant, left)


def largest_group(scores: np.ndarray) -> Group:
    """The score that most samples have, the lowest of several such. Of no samples, a group of none."""
    ordered = np.sort(scores)  # NaN last
    missing = int(np.count_nonzero(np.isnan(ordered)))
    ordered = ordered[: len(ordered) - missing]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(ordered) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(ordered)))
    if missing > sizes.max(initial=0) or not len(ordered):
        return Group(float("nan"), missing)
    largest = int(sizes.argmax())
    return Group(float(ordered[starts[largest]]) + 0.0, int(sizes[largest]))  # not -0


def correlations(known: SignalScores) -> np.ndarray:
    """[signals, signals] Spearman's rank correlations, 1 where two signals rank the samples alike; NaN for a constant
    one. Equal scores have the mean of their ranks, samples without a score rank last. Of a larger table about `SAMPLED`
    samples are taken, evenly over it."""
    ranks = np.array([average_ranks(hardness) for hardness in known.hardness(SAMPLED)])
    off = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt((off**2).sum(axis=1))
    norm[norm == 0] = np.nan
    return (off / norm[:, None]) @ (off / norm[:, None]).T


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """[samples] float64 ranks from 1, low scores first; equal scores share their mean rank, NaN ranks last."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _counted(name: str, group: Group, N: int) -> str:
    """How many samples have one score."""
    of = f"all {N:,}" if group.samples == N else f"{group.samples:,} of {N:,}"
    return (
        f"{name}: {of} samples have no score"
        if np.isnan(group.score)
        else (f"{name}: {of} samples have one score, {group.score:.4g}")
    )


def _advice(known: SignalScores, one: Weighted, left: list[Weighted]) -> str:
    """Why a signal is blind, as far as its scores tell, and what to do."""
    score, instead = largest_group(known.scores[known.signals.index(one)]).score, _instead(known, left)
    if np.isnan(score):
        return f". See what it is computed from, or {instead}"
    if one.signal.name == "rouge_l" and score == 0:
        return (
            ": the student answers nothing right yet (or ROUGE-L does not see the script of the references: see"
            " --rouge-tokenizer). Warm it up on the references first, or for longer (--warmup-epochs), take a larger"
            f" student, or {instead}"
        )
    if one.signal.name == "rouge_l" and score == 1:
        return f": the student answers these right already. Give samples that are harder for it, or {instead}"
    return f", so it does not tell which of these is harder: {instead}"


def _instead(known: SignalScores, left: list[Weighted]) -> str:
    """What to rank by where a signal tells nothing: the signals that are left, another one, or no order at all."""
    if left:
        return f"leave it out: --signals {_given(left)}"
    chosen = {one.signal.name for one in known.signals}
    for name in ("cross_entropy", "rouge_l"):
        if name not in chosen:
            return f"rank by another signal: --signals {name}"
    return "train without an order: --curriculum none"


def _given(signals: list[Weighted]) -> str:
    """The signals as the option names them."""
    return ",".join(one.signal.name + (f"={one.weight:g}" if one.weight != 1 else "") for one in signals)


def _uncorrelated(known: SignalScores, constant: set[str], left: list[Weighted]) -> list[SignalLine]:
    """Lines for those of the signals `left` that agree with no other."""
    if len(left) < 2:
        return []
    found = correlations(known)
    np.fill_diagonal(found, np.nan)
    names = [one.signal.name for one in known.signals]
    highest = np.array([np.max(row, initial=-np.inf, where=~np.isnan(row)) for row in found])
    alone = [one for one in left if -np.inf < highest[names.index(one.signal.name)] < LEAST_CORRELATION]
    if len(alone) == len(names) - len(constant) == 2:
        first, second = (one.signal.name for one in alone)
        text = (
            f"{first} and {second}: their rank correlation is {highest[names.index(first)]:.2f}, below"
            f" {LEAST_CORRELATION}: they do not agree on what is hard, and the fused order follows neither. Rank by the"
            f" one that you trust: --signals {first} or --signals {second}"
        )
        return [SignalLine((first, second), "uncorrelated", text)]
    lines = []
    for one in alone:
        row = found[names.index(one.signal.name)]
        nearest = names[int(np.nanargmax(row))]
        text = (
            f"{one.signal.name}: its rank correlation with every other signal is below {LEAST_CORRELATION} (at most"
            f" {np.nanmax(row):.2f}, with {nearest}): it agrees with none of them on what is hard. Leave it out:"
            f" --signals {_given([other for other in left if other is not one])}; or rank by it alone:"
            f" --signals {one.signal.name}"
        )
        lines.append(SignalLine((one.signal.name,), "uncorrelated", text))
    return lines
