"""The part of a large grid that every run takes: each pair of two axes' values is in it, but not each triple.

A grid is marked `pairwise`; the mark's words name axes whose every combination stays. `pytest --full` takes all of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Hashable]  # a value of each axis


def covering(rows: Sequence[Row], together: Iterable[str] = ()) -> list[int]:
    """Places of rows that hold every pair of values of two axes, and every combination of values of the axes
    `together`, that any row holds. Greedy, so not always the fewest; of equal rows the first, so always the same."""
    wanted = [_combinations(row, tuple(together)) for row in rows]
    open_ones = set().union(*wanted)
    gains = {place: len(combinations) for place, combinations in enumerate(wanted)}
    chosen = []
    while open_ones:
        best, gain = -1, 0
        for place in sorted(gains, key=lambda place: (-gains[place], place)):
            if gains[place] <= gain:  # a gain only ever falls, so none behind is larger
                break
            gains[place] = len(wanted[place] & open_ones)
            if gains[place] > gain or (gains[place] == gain and place < best):
                best, gain = place, gains[place]
        open_ones -= wanted[best]
        del gains[best]
        chosen.append(best)
    return sorted(chosen)


def rows_of(items: Iterable[Any]) -> list[dict[str, int]]:
    """Of tests of one grid: each value as its place among its axis' values, in the order in which these appear."""
    places: dict[str, dict[int, int]] = {}
    rows = []
    for item in items:
        values = {axis: (id(value), places.setdefault(axis, {})) for axis, value in item.callspec.params.items()}
        rows.append({axis: known.setdefault(key, len(known)) for axis, (key, known) in values.items()})
    return rows


def _combinations(row: Row, together: tuple[str, ...]) -> set[tuple[tuple[str, Hashable], ...]]:
    missing = set(together) - set(row)
    if missing:
        raise ValueError(f"no axis {', '.join(sorted(missing))} among {', '.join(row)}")
    groups = [*itertools.combinations(row, 2), *([together] if together else []), *((axis,) for axis in row)]
    return {tuple((axis, row[axis]) for axis in group) for group in groups}
