"""Reciprocal rank fusion: several rankings of the same samples become one.

Knows arrays of scores. Does not know where the scores come from, nor stages; the ranking itself is C++.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

import pocl_fast._C as _C

Ties: TypeAlias = Literal["average", "first"]


@dataclass(frozen=True)
class RankFusion:
    """Several rankings of the same samples fused into one."""

    score: np.ndarray  # [samples] float64, by sample; high is easy
    rank: np.ndarray  # [samples] int64, by sample; the easiest has 1
    order: np.ndarray  # [samples] int64: the samples, easiest first; the earlier of samples with one score first

    @cached_property
    def tied(self) -> int:
        """How many samples have a fused score that others have too: among these, the order is that of the arrays."""
        return in_groups(self.score[self.order])


def reciprocal_rank_fusion(
    scores: Sequence[np.ndarray],
    *,
    descending: Sequence[bool],
    k: float = 60.0,
    weights: Sequence[float] | None = None,
    ties: Ties = "average",
    threads: int | None = None,
) -> RankFusion:
    """Fuses rankings: score = Σ weight / (k + rank), rank from 1; the highest score is the easiest sample.

    `scores` are 1-D arrays of one length; `descending` says for each whether its high values are easy (ROUGE-L: True)
    or its low ones (cross-entropy: False). Samples of one score in an array have the mean of their ranks ("average"),
    or each its own, the earlier sample first ("first", which lets the place in the arrays decide). -0 equals 0. NaN is
    last, with a warning that counts them, and equals NaN: with "average", m of n are NaN and all have the rank
    n - (m - 1) / 2. Where fused scores are equal, the earlier sample is first with either; `RankFusion.tied` counts
    these. `threads` is by default one for each processor that the process may use; the result does not depend on it.

    Raises ValueError for no arrays, arrays that are not 1-D numbers of one length, a number of flags or weights other
    than that of the arrays, negative weights, k that is not positive, other `ties` and `threads` below 1.
    (Cormack, Clarke and Büttcher 2009; arXiv 2506.05695, equation 5, with k = 60.)
    """
    arrays = [_checked_scores(position, array) for position, array in enumerate(scores)]
    if not arrays:
        raise ValueError("reciprocal_rank_fusion needs at least one array of scores")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"all scores must be of one length, got {[len(array) for array in arrays]}")
    flags = [bool(flag) for flag in descending]
    if len(flags) != len(arrays):
        raise ValueError(f"descending needs one flag for each array of scores: {len(arrays)}, not {len(flags)}")
    chosen = [1.0] * len(arrays) if weights is None else [float(weight) for weight in weights]
    if len(chosen) != len(arrays):
        raise ValueError(f"weights needs one number for each array of scores: {len(arrays)}, not {len(chosen)}")
    if not all(0 <= weight < np.inf for weight in chosen):
        raise ValueError(f"weights must be finite and not negative, got {chosen}")
    if not 0 < k < np.inf:
        raise ValueError(f"k must be positive and finite, got {k}")
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be one of {', '.join(get_args(Ties))}, got {ties!r}")
    for position, array in enumerate(arrays):
        if missing := np.count_nonzero(np.isnan(array)):
            warnings.warn(f"scores[{position}]: {missing} of {len(array)} are NaN; they rank last in it", stacklevel=2)
    return RankFusion(*_C.rank_fusion(arrays, flags, chosen, float(k), ties == "average", threads))


def in_groups(ordered: np.ndarray) -> int:
    """How many of these numbers equal a neighbour: of a sorted array [N], those that are there more than once."""
    same = ordered[1:] == ordered[:-1]
    return int(np.count_nonzero(np.append(same, False) | np.append(False, same)))


def _checked_scores(position: int, given: Any) -> np.ndarray:
    """One array of scores, contiguous, float32 or float64."""
    array = np.asarray(given)
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise ValueError(f"scores[{position}] must be a 1-D array of numbers, got shape {array.shape} of {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float32 if array.dtype == np.float32 else np.float64)
