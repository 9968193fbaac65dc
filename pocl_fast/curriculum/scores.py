"""From a difficulty table to an order of its samples: the signals' scores, read in pieces, and their fusion.

Knows the table's file. Does not know how its columns were measured, nor stages.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.curriculum.fusion import RankFusion, Ties, reciprocal_rank_fusion
from pocl_fast.curriculum.signals import TEACHER_SCORES, Weighted, columns_read
from pocl_fast.system.errors import InputError

ROWS = 1 << 16  # of the table in memory at a time


@dataclass(frozen=True)
class SignalScores:
    """Each sample's score by each signal."""

    index: np.ndarray  # [samples] int64: which sample of the training file
    signals: tuple[Weighted, ...]
    scores: tuple[np.ndarray, ...]  # of each signal [samples] float64, in the table's order

    def missing(self) -> dict[str, int]:
        """Signal -> how many samples have no score (NaN) by it; those without such samples are left out."""
        counts = {
            one.signal.name: int(np.count_nonzero(np.isnan(array)))
            for one, array in zip(self.signals, self.scores, strict=True)
        }
        return {name: count for name, count in counts.items() if count}

    def constant(self) -> list[str]:
        """The signals by which all samples are alike, or none has a score: they rank none."""
        both = zip(self.signals, self.scores, strict=True)
        return [one.signal.name for one, array in both if len(array) > 1 and _alike(array)]

    def hardness(self, count: int) -> list[np.ndarray]:
        """Each signal's scores of about `count` samples, evenly over the table; easy samples have the low ones."""
        every = max(1, len(self.index) // count)
        both = zip(self.signals, self.scores, strict=True)
        return [-array[::every] if one.signal.easy == "high" else array[::every] for one, array in both]

    def fused(self, k: float, ties: Ties) -> RankFusion:
        """Reciprocal rank fusion of the signals, without those that rank none, unless all are such; samples without a
        score rank last by that signal."""
        left_out = set(self.constant())
        if len(left_out) < len(self.signals):
            kept = [i for i, one in enumerate(self.signals) if one.signal.name not in left_out]
        else:
            kept = list(range(len(self.signals)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of NaN, which `missing` counts by name
            return reciprocal_rank_fusion(
                [self.scores[i] for i in kept],
                descending=[self.signals[i].signal.easy == "high" for i in kept],
                k=k,
                weights=[self.signals[i].weight for i in kept],
                ties=ties,
            )


def _alike(array: np.ndarray) -> bool:
    """Whether all scores are equal, or all missing."""
    return bool(array.min() == array.max() or np.isnan(array).all())


def read_scores(path: Path, chosen: Sequence[Weighted]) -> SignalScores:
    """The signals' scores of every sample in a difficulty table, of which a few rows are in memory at a time; with the
    columns of `TEACHER_SCORES` beside it, where that is there.

    Raises `InputError` where a table is missing or damaged, the two are of other samples, a column that a signal reads
    is in neither, or a user's function fails.
    """
    table, beside = open_difficulty(path), path.with_name(TEACHER_SCORES)
    read = columns_read(list(chosen))
    own = table.schema_arrow.names
    needs_more = read is None or not set(read) <= set(own)
    added = open_table(beside).schema_arrow.names if needs_more and beside.exists() else []
    columns = list(dict.fromkeys((*own, *added) if read is None else ("index", *read)))
    if missing := [name for name in columns if name not in own and name not in added]:
        raise InputError(
            f"{path} lacks the columns {missing}, which --signals {','.join(one.signal.name for one in chosen)} reads:"
            " give `pocl-fast measure` the same --signals; if an older version measured, delete the table first"
        )
    pieces = _batches(path, [name for name in columns if name in own])
    if from_teacher := [name for name in columns if name not in own]:
        pieces = _beside(pieces, beside, ["index", *from_teacher])
    N = table.metadata.num_rows
    index = np.empty(N, dtype=np.int64)
    scores = tuple(np.empty(N) for _ in chosen)
    row = 0
    for arrays in pieces:
        part = slice(row, row + len(arrays["index"]))
        index[part] = arrays["index"]
        for one, out in zip(chosen, scores, strict=True):
            out[part] = one.signal.scores(arrays)
        row = part.stop
    return SignalScores(index, tuple(chosen), scores)


def _batches(path: Path, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """`ROWS` rows of a table's columns at a time."""
    try:
        for batch in open_table(path).iter_batches(batch_size=ROWS, columns=columns):
            yield {name: batch[name].to_numpy(zero_copy_only=False) for name in columns}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run `pocl-fast measure` again") from error


def _beside(
    pieces: Iterator[dict[str, np.ndarray]], path: Path, columns: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    """The pieces with the columns of the table at `path`, whose rows must be of the same samples."""
    nothing: dict[str, np.ndarray] = {"index": np.empty(0)}
    for ours, theirs in itertools.zip_longest(pieces, _batches(path, columns), fillvalue=nothing):
        if not np.array_equal(ours["index"], theirs["index"]):
            raise InputError(
                f"{path} is of other samples than the difficulty table beside it; delete it and run"
                " `pocl-fast measure` again"
            )
        yield theirs | ours


def open_difficulty(path: Path) -> pq.ParquetFile:
    """The table that `pocl-fast measure` wrote, to be read in pieces. Raises `InputError` where it is missing or is not
    such a table."""
    table = open_table(path)
    if missing := {"index", "rouge_l", "cross_entropy"} - set(table.schema_arrow.names):
        raise InputError(f"{path} lacks the columns {sorted(missing)}")
    return table


def open_table(path: Path) -> pq.ParquetFile:
    """A Parquet file of `pocl-fast measure`. Raises `InputError` where it is missing or damaged."""
    try:
        return pq.ParquetFile(path, pre_buffer=False)  # a buffer would hold whole row groups
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there: run `pocl-fast measure` first") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run `pocl-fast measure` again") from error
