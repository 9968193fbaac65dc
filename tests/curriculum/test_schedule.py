"""The steps of a training: each pass has every sample once, and a place follows from a step's number alone."""

import numpy as np
import pytest
from tiny_training import curriculum_of

from pocl_fast.curriculum.schedule import BatchSize, Schedule


def schedule(count=22, stages=2, size=None, lengths=None, **options):
    curriculum = curriculum_of(count, stages=stages)
    known = lengths or {i: 5 + i % 7 for i in range(count)}
    return Schedule(curriculum, known, size or BatchSize(4), **({"epochs": 2} | options))


def samples(plan, step):
    """The samples of each micro-batch of a step, all ranks in order."""
    size = plan.size
    return [plan.batch(step, part, rank) for part in range(size.accumulation) for rank in range(size.ranks)]


# 22 samples in stages of 11 and 22: no batch size divides either
SIZES = [
    BatchSize(4),
    BatchSize(1),
    BatchSize(50),  # more than there are
    BatchSize(2, accumulation=2),
    BatchSize(2, ranks=3),
    BatchSize(3, accumulation=2, ranks=2),
    BatchSize(tokens=30),
    BatchSize(tokens=1),  # less than any sample: each alone
    BatchSize(tokens=20, accumulation=2, ranks=2),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pass_has_each_sample_of_its_stage_once(size):
    plan = schedule(size=size)
    passes = {}
    for step in range(plan.total_steps):
        place = plan.place(step)
        passes.setdefault((place.stage, place.epoch), []).extend(i for part in samples(plan, step) for i in part)
    assert list(passes) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (stage, _), indices in passes.items():
        assert sorted(indices) == list(range((11, 22)[stage]))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_micro_batch_is_over_its_size(size):
    plan = schedule(size=size)
    for step in range(plan.total_steps):
        for part in samples(plan, step):
            if size.tokens is None:
                assert len(part) <= size.samples
        tokens = sum(plan.lengths[i] for part in samples(plan, step) for i in part)
        if size.tokens is not None:
            assert tokens <= size.tokens * size.parts or sum(map(len, samples(plan, step))) == 1


def test_places_count_steps_epochs_and_passes():
    plan = schedule(count=8, stages=2)  # stages of 4 and 8: 1 and 2 steps a pass
    places = [plan.place(step) for step in range(plan.total_steps)]
    assert [(p.stage, p.epoch, p.step, p.step_in_stage) for p in places] == [
        (0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0), (1, 0, 1, 1), (1, 1, 0, 2), (1, 1, 1, 3),
    ]  # fmt: skip
    assert [p.passes for p in places] == [1, 2, 2.5, 3, 3.5, 4]
    assert [p.ends_epoch for p in places] == [True, True, False, True, False, True]
    assert [p.ends_stage for p in places] == [False, True, False, False, False, True]
    with pytest.raises(IndexError):
        plan.place(6)


def test_a_stage_of_fixed_steps_goes_round_its_samples_as_often_as_it_takes():
    plan = schedule(count=8, stages=2, stage_steps=5)
    assert plan.total_steps == 10
    places = [plan.place(step) for step in range(10)]
    assert [(p.stage, p.epoch, p.step) for p in places[5:]] == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 2, 0)]
    assert places[-1].ends_epoch  # the stage's last step ends what there is of its pass
    assert places[-1].passes == 5 + 2.5


def test_steps_after_a_stage_that_ended_early_move_up():
    plan = schedule(count=8, stages=2)
    before = [samples(plan, step) for step in range(plan.total_steps)]
    plan.end_stage(0, 1)
    assert plan.total_steps == 5
    assert plan.planned_total == 6
    assert [plan.place(step).stage for step in range(5)] == [0, 1, 1, 1, 1]
    assert [samples(plan, step) for step in range(1, 5)] == before[2:]


def test_the_order_depends_on_the_seed_alone():
    def orders(**options):
        return [samples(plan, step) for plan in [schedule(**options)] for step in range(plan.total_steps)]

    assert orders(seed=1) == orders(seed=1)
    assert orders(seed=1) != orders(seed=2)
    plan = schedule(seed=1)
    first_steps = {tuple(*samples(plan, step)) for step in range(plan.total_steps) if plan.place(step).step == 0}
    assert len(first_steps) == 4  # each pass in another order
    backwards = [samples(plan, step) for step in reversed(range(plan.total_steps))]
    assert backwards[::-1] == orders(seed=1)


def test_ranks_have_about_the_same_tokens():
    lengths = {i: int(n) for i, n in enumerate(np.random.default_rng(0).integers(1, 200, 400))}
    plan = schedule(count=400, stages=1, size=BatchSize(8, ranks=4), lengths=lengths)
    worst = 0.0
    for step in range(12):
        tokens = [sum(lengths[i] for i in part) for part in samples(plan, step)]
        worst = max(worst, max(tokens) / (sum(tokens) / 4))
    assert worst < 1.1  # dealt in file order the longest has up to 1.5 times the mean


def test_a_new_order_holds_from_its_stage_on():
    plan = schedule(count=8, stages=2, epochs=1)
    plan.reorder(1, np.arange(8)[::-1])
    assert sorted(plan.subset(0)) == [0, 1, 2, 3]
    plan.reorder(0, np.arange(8)[::-1])
    assert sorted(plan.subset(0)) == [4, 5, 6, 7]
    assert sorted(i for part in samples(plan, 0) for i in part) == [4, 5, 6, 7]


def test_a_new_order_of_more_samples_brings_in_none_that_the_curriculum_lacks():
    plan = schedule(count=8, stages=2, epochs=1)
    plan.reorder(0, np.arange(12)[::-1])
    assert plan.subset(1).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert sorted(i for part in samples(plan, 0) for i in part) == [4, 5, 6, 7]


def test_temperature_and_alpha_stay_within_a_stage_or_move_to_the_next_ones():
    curriculum = curriculum_of(8, stages=2, temperatures=[1, 2], alphas=[0.4, 0])
    made = {"lengths": dict.fromkeys(range(8), 5), "size": BatchSize(4), "epochs": 4}
    constant = Schedule(curriculum, **made)
    assert [constant.setting(constant.place(s)) for s in (0, 3, 4, 11)] == [(1, 0.4), (1, 0.4), (2, 0), (2, 0)]
    linear = Schedule(curriculum, **made, within_stage="linear")
    want = [(1, 0.4), (1.25, 0.3), (1.5, 0.2), (1.75, 0.1)]
    assert [linear.setting(linear.place(s)) for s in range(4)] == [pytest.approx(pair) for pair in want]
    assert linear.setting(linear.place(4)) == (2, 0)
