"""Objects that the collector of garbage does not look at for a while."""

import gc
import weakref

import pytest
from tiny import arithmetic, tiny_tokenizer

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import Fitting
from pocl_fast.records.samples import samples_from
from pocl_fast.system.garbage import old_objects_set_aside


class Node:
    """An object that can be part of a circle."""


@pytest.fixture(autouse=True)
def _nothing_frozen():
    gc.unfreeze()
    yield
    gc.unfreeze()


def circle():
    one = Node()
    one.self = one
    return weakref.ref(one)


def test_garbage_that_is_made_meanwhile_is_collected_and_older_garbage_afterwards():
    gc.collect()
    gc.disable()
    old = circle()
    with old_objects_set_aside():
        new = circle()
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.enable()
    gc.collect()
    assert old() is None


def test_what_the_caller_has_set_aside_stays_so_and_nothing_joins_it():
    old = Node()
    gc.freeze()
    new = Node()
    with old_objects_set_aside():
        assert (looked_at(old), looked_at(new)) == (False, True)
    assert (looked_at(old), looked_at(new)) == (False, True)


def looked_at(one):
    """Whether the collector looks at an object. Their number says less: other objects end meanwhile."""
    return any(known is one for known in gc.get_objects())


def test_of_two_blocks_the_one_that_ends_first_leaves_the_others_objects_aside():
    one, other = old_objects_set_aside(), old_objects_set_aside()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_freeze_count() > 0
    other.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0


def test_who_reads_samples_to_the_end_or_not_has_the_collector_as_before():
    limits = {"max_length": 900, "max_prompt_length": 800, "long_prompts": "error", "name": "x"}
    for stops_at in (1, 9):
        each = Fitting(SampleEncoder(tiny_tokenizer()), **limits).fitted(samples_from(arithmetic(9), "x"))
        for _ in range(stops_at):
            next(each)
        assert gc.get_freeze_count() > 0
        each.close()
        assert gc.get_freeze_count() == 0
