"""The part of a grid that every run takes holds each pair of values."""

import itertools

import pytest
from pairwise import covering

AXES = {"a": range(6), "b": range(4), "c": range(3), "d": range(2)}
GRID = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def of(rows, *axes):
    return {tuple(row[axis] for axis in axes) for row in rows}


def test_every_pair_of_values_is_there_in_few_rows():
    rows = [GRID[place] for place in covering(GRID)]
    for pair in itertools.combinations(AXES, 2):
        assert of(rows, *pair) == of(GRID, *pair)
    assert len(rows) <= 30  # of 144; no fewer than 24 can do


def test_every_combination_of_the_axes_together_is_there():
    rows = [GRID[place] for place in covering(GRID, ("b", "c", "d"))]
    assert of(rows, "b", "c", "d") == of(GRID, "b", "c", "d")
    assert of(rows, "a", "b") == of(GRID, "a", "b")


# as where a grid is a list of its rows
def test_nothing_is_asked_of_pairs_that_no_row_holds():
    grid = [{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0, "b": 0}]
    assert covering(grid) == [0, 1]
    assert covering([{"a": 3}, {"a": 4}]) == [0, 1]
    assert covering([{}]) == []


def test_the_same_rows_are_chosen_every_time():
    assert covering(GRID, ("a", "b")) == covering(GRID, ("a", "b"))


def test_an_axis_that_the_grid_lacks_is_named():
    with pytest.raises(ValueError, match="no axis e among a, b, c, d"):
        covering(GRID, ("a", "e"))
