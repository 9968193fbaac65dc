"""A table made in jobs, shared out among the ranks: each job's rows are kept in a file until all are there.

Jobs are planned from the data alone, so that neither an interruption nor the number of ranks changes what is computed
together. Knows files and ranks. Does not know what the rows mean.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.system import ranks
from pocl_fast.system.console import Report
from pocl_fast.system.errors import InputError

T = TypeVar("T")
PIECE = 4096  # samples that are planned together, and in memory at a time


@dataclass(frozen=True)
class Job(Generic[T]):
    """Items that are computed together."""

    items: Sequence[T]
    weight: float  # how much work they are


def pieces_of(items: Sequence[T]) -> list[Sequence[T]]:
    """The items, `PIECE` at a time."""
    return [items[start : start + PIECE] for start in range(0, len(items), PIECE)]


def make_table(
    pieces: Iterable[Sequence[T]],
    plan: Callable[[Sequence[T]], list[Job[T]]],
    work: Callable[[Sequence[T]], pa.Table],
    output: Path,
    report: Report = lambda _: None,
) -> None:
    """Writes `output` (Parquet): the rows that `work` makes of every item, in the order of their column `index`.

    `plan` gives the jobs of a piece, the same on every rank and in every call. The `index` of a row must lie in its
    piece's range. Memory holds one piece at a time, and the rows of one job or, at the end, of one piece. All ranks
    must call: each computes its share, rank 0 gathers the rows, and all return once `output` is there. `report` is
    called with how many more items all ranks have done.

    An existing `output` is kept, and so are the parts (in `<stem>.parts` beside it) of an interrupted call: the caller
    makes sure that they are of the same data and options. Raises `InputError` where the ranks do not see one folder,
    ValueError for no items.
    """
    parts = output.with_suffix(".parts")
    if ranks.from_first(output.exists):
        return _clear(parts)
    known = ranks.from_first(lambda: _whole_parts(parts))
    jobs_of_piece = []
    for number, piece in enumerate(pieces):
        jobs = plan(piece)
        jobs_of_piece.append(len(jobs))
        folder = parts / f"{number:06d}"
        missing = [job for job in range(len(jobs)) if (number, job) not in known]
        left = len(piece)
        for job in sorted({*range(len(jobs))} - {*missing}):
            report(len(jobs[job].items))
            left -= len(jobs[job].items)
        for mine in ranks.share([jobs[job].weight for job in missing]):
            job = missing[mine]
            folder.mkdir(parents=True, exist_ok=True)
            _write(work(jobs[job].items), folder / f"{job:06d}.parquet")
            done = min(left, len(jobs[job].items) * ranks.world_size())  # the others are about as far
            report(done)
            left -= done
        report(left)
    if not jobs_of_piece:
        raise ValueError("make_table: no items")
    ranks.barrier()
    ranks.from_first(lambda: _gather(parts, jobs_of_piece, output))
    _clear(parts)


def _whole_parts(parts: Path) -> set[tuple[int, int]]:
    """(piece, job) of the parts whose file is whole; what a power cut has damaged is computed again."""
    found = set()
    for path in parts.glob("*/*.parquet"):
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError):
            continue
        found.add((int(path.parent.name), int(path.stem)))
    return found


def _gather(parts: Path, jobs_of_piece: Sequence[int], output: Path) -> None:
    """Writes the parts' rows as one file, a row group a piece."""
    partial = output.with_name(output.name + ".partial")
    writer: pq.ParquetWriter | None = None
    try:
        for number, jobs in enumerate(jobs_of_piece):
            paths = [parts / f"{number:06d}" / f"{job:06d}.parquet" for job in range(jobs)]
            if lost := [path for path in paths if not path.exists()]:
                raise InputError(f"{lost[0]} was written by another rank and is not here: --output must be one folder")
            table = pa.concat_tables([pq.read_table(path) for path in paths]).sort_by("index")
            writer = writer or pq.ParquetWriter(partial, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()
    os.replace(partial, output)


def _clear(parts: Path) -> None:
    if ranks.is_first():
        shutil.rmtree(parts, ignore_errors=True)


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)
