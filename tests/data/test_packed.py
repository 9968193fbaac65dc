"""Packed batches: the layout of a row, and batches within a budget of tokens."""

import pytest

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import pack, token_budget_batches


def test_the_layout_supervises_each_response_token_from_the_token_before_it():
    batch = pack([EncodedSample(0, (5, 6), (7, 8), False), EncodedSample(1, (1,), (2,), False)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.supervised.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 2]
    assert (batch.lengths, batch.counts) == ((4, 2), (2, 1))


def test_no_samples_cannot_be_packed():
    with pytest.raises(ValueError, match="no samples"):
        pack([])


def test_token_budget_batches_hold_every_item_once_within_the_budget():
    lengths = [5, 9, 1, 30, 4, 4, 8]
    batches = token_budget_batches(lengths, max_tokens=10)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(sum(lengths[i] for i in batch) <= 10 or len(batch) == 1 for batch in batches)
