"""Large buffers of the C++ backend: kept when they are given back, few of them, and freed when asked."""

from __future__ import annotations

import pytest
import torch

from pocl_fast.loss import cpp

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    cpp.release_buffers()
    yield
    cpp.release_buffers()


def buffer(mib):
    return cpp.empty_rows(mib, MIB // 4, torch.float32)


def test_buffers_are_found_again_by_their_size():
    first = {mib: buffer(mib) for mib in (8, 24, 72)}
    places = {mib: x.data_ptr() for mib, x in first.items()}
    first.clear()
    again = {mib: buffer(mib) for mib in (24, 72, 6)}  # 8 are enough for 6
    assert {mib: x.data_ptr() for mib, x in again.items()} == {24: places[24], 72: places[72], 6: places[8]}


def test_a_buffer_in_use_is_nobody_elses():
    buffers = [buffer(8).fill_(i) for i in range(6)]
    assert [x.unique().tolist() for x in buffers] == [[i] for i in range(6)]


def test_the_four_largest_are_kept():
    buffers = [buffer(mib) for mib in (8, 12, 10, 6, 14)]
    buffers.clear()
    assert cpp.release_buffers() == (8 + 10 + 12 + 14) * MIB
    assert cpp.release_buffers() == 0


# growing batches, or one that is small: what does not fit goes before more is taken
@pytest.mark.parametrize("sizes", [(8, 10, 12, 14), (64, 8)])
def test_sizes_that_change_keep_one(sizes):
    for mib in sizes:
        buffer(mib)
    assert cpp.release_buffers() == sizes[-1] * MIB


def test_small_matrices_are_not_kept():
    cpp.empty_rows(3, 100, torch.bfloat16)
    assert cpp.release_buffers() == 0
