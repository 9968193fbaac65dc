"""From a difficulty table to an order of its samples: the signals' scores, read in pieces, and their fusion.

Knows the table's file. Does not know how its columns were measured, nor stages.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.curriculum import RankFusion, reciprocal_rank_fusion
from pocl_fast.errors import InputError
from pocl_fast.signals import Weighted, columns_read

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

    def fused(self, k: float) -> RankFusion:
        """Reciprocal rank fusion of all signals; samples without a score rank last by that signal."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of NaN, which `missing` counts by name
            return reciprocal_rank_fusion(
                self.scores,
                descending=[one.signal.easy == "high" for one in self.signals],
                k=k,
                weights=[one.weight for one in self.signals],
            )


def read_scores(path: Path, chosen: Sequence[Weighted]) -> SignalScores:
    """The signals' scores of every sample in a difficulty table, of which a few rows are in memory at a time.

    Raises `InputError` where the table is missing or damaged, lacks a column that a signal reads, or a user's function
    fails.
    """
    table = open_difficulty(path)
    known = table.schema_arrow.names
    read = columns_read(list(chosen))
    columns = known if read is None else list(dict.fromkeys(("index", *read)))
    if missing := [name for name in columns if name not in known]:
        raise InputError(
            f"{path} lacks the columns {missing}, which --signals {','.join(one.signal.name for one in chosen)} reads:"
            " give `pocl-fast measure` the same --signals"
        )
    N = table.metadata.num_rows
    index = np.empty(N, dtype=np.int64)
    scores = tuple(np.empty(N) for _ in chosen)
    row = 0
    try:
        for batch in table.iter_batches(batch_size=ROWS, columns=columns):
            part = slice(row, row + len(batch))
            arrays = {name: batch[name].to_numpy(zero_copy_only=False) for name in columns}
            index[part] = arrays["index"]
            for one, out in zip(chosen, scores, strict=True):
                out[part] = one.signal.scores(arrays)
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run `pocl-fast measure` again") from error
    return SignalScores(index, tuple(chosen), scores)


def open_difficulty(path: Path) -> pq.ParquetFile:
    """The table that `pocl-fast measure` wrote, to be read in pieces. Raises `InputError` where it is missing or is not
    such a table."""
    try:
        table = pq.ParquetFile(path, pre_buffer=False)  # a buffer would hold whole row groups
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there: run `pocl-fast measure` first") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run `pocl-fast measure` again") from error
    if missing := {"index", "rouge_l", "cross_entropy"} - set(table.schema_arrow.names):
        raise InputError(f"{path} lacks the columns {sorted(missing)}")
    return table
