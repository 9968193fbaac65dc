"""Every part that lists the divergences or the stats of a token lists the same, in the same order."""

import dataclasses
from typing import get_args, get_type_hints

import pytest

from pocl_fast import _C
from pocl_fast.loss.objective import DIVERGENCES
from pocl_fast.loss.output import STATS
from pocl_fast.loss.reference import Rows
from pocl_fast.loss.row_operator import NUM_STATS
from pocl_fast.options import training as options


def test_the_cpp_kernels_know_the_same_divergences_and_write_as_many_stats():
    assert _C.divergences() == list(DIVERGENCES)
    assert _C.NUM_STATS == NUM_STATS == len(Rows._fields)


def test_the_triton_kernels_know_the_same_divergences_and_write_as_many_stats():
    pytest.importorskip("triton")
    from pocl_fast.kernels import divergence, tiles

    assert {name: number for number, name in enumerate(DIVERGENCES)} == divergence.FAMILIES
    assert tiles.STATS.value == NUM_STATS


def test_the_command_line_offers_the_same_divergences():
    offered = [
        get_type_hints(group)["divergence"]
        for group in vars(options).values()
        if dataclasses.is_dataclass(group) and "divergence" in get_type_hints(group)
    ]
    assert offered
    assert all(get_args(kind) == DIVERGENCES for kind in offered)


def test_an_output_names_what_the_kernels_write_after_the_loss():
    assert ("loss", *STATS) == Rows._fields
