"""Controls of a curriculum: other orders and paces, each with exactly as many optimizer steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_fast.curriculum.competence import Competence, Draws
from pocl_fast.curriculum.pacing import evenly, paced
from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.curriculum.stages import baby_steps, control_line, is_measured, stages_over, unmeasured_curriculum
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.system.errors import InputError

KINDS = ("pocl", "none", "random", "reverse", "length")


@dataclass
class Settings:
    curriculum: str = "pocl"
    stages: int = 4
    rrf_k: float = 60.0
    temperature: list[float] = field(default_factory=lambda: [1.0, 2.0])
    alpha: list[float] = field(default_factory=lambda: [0.3, 0.0])
    pacing: str = "baby-steps"
    initial_competence: float = 0.1
    full_competence: float = 0.6
    within_stage: str = "constant"
    epochs_per_stage: int = 2
    steps_per_stage: int | None = None
    stage_length: str = "passes"


def samples_of(count, seed=0):
    """Samples of 1 to 9 prompt and 1 to 30 response tokens, every third index left out."""
    random = np.random.default_rng(seed)
    index = [i for i in range(2 * count) if i % 3][:count]
    sizes = random.integers(1, [10, 31], (count, 2)).tolist()
    return [EncodedSample(i, (1,) * p, (2,) * r, False) for i, (p, r) in zip(index, sizes, strict=True)]


def schedule(samples, size=None, seed=42, **settings):
    """The schedule of such a training; the measured difficulty is by chance, and "reverse" has it turned round."""
    chosen = Settings(**settings)
    if is_measured(chosen):
        order = np.random.default_rng(7).permutation([sample.index for sample in samples])
        turned = order[::-1] if chosen.curriculum == "reverse" else order
        curriculum = stages_over(turned, np.zeros(len(order)), chosen)
    else:
        curriculum = unmeasured_curriculum(samples, chosen, seed=seed)
    lengths = {sample.index: len(sample) for sample in samples}
    return paced(curriculum, lengths, size or BatchSize(4), chosen, seed=seed)


def step_samples(plan, step):
    size = plan.size
    parts = [plan.batch(step, part, rank) for part in range(size.accumulation) for rank in range(size.ranks)]
    return [index for part in parts for index in part]


# -- the number of steps --

SIZES = st.builds(BatchSize, st.integers(1, 40), st.none(), st.integers(1, 3), st.integers(1, 4))


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 5), SIZES, st.booleans())
def test_every_control_has_exactly_the_steps_of_the_curriculum(more, stages, epochs, size, by_steps):
    samples = samples_of(stages + more)
    options = {"stages": stages, "epochs_per_stage": epochs, "steps_per_stage": 3 if by_steps else None}
    want = schedule(samples, size, **options).total_steps
    sizes = [len(samples) // stages * (i + 1) for i in range(stages - 1)] + [len(samples)]
    if not by_steps:
        assert want == sum(epochs * math.ceil(n / (size.samples * size.parts)) for n in sizes)
    for kind in KINDS:
        assert schedule(samples, size, curriculum=kind, **options).total_steps == want
        assert schedule(samples, size, curriculum=kind, stage_length="equal", **options).total_steps == want
        if kind != "none":
            assert schedule(samples, size, curriculum=kind, pacing="competence", **options).total_steps == want


def test_without_a_curriculum_the_last_of_two_and_a_half_passes_is_half_a_pass():
    samples = samples_of(32)
    plan = schedule(samples, curriculum="none", epochs_per_stage=1)  # of 8, 16, 24 and 32 samples: 20 steps
    assert plan.total_steps == 20
    assert [plan.place(step).passes for step in (7, 15, 19)] == [1, 2, 2.5]
    assert [step for step in range(20) if plan.place(step).ends_epoch] == [7, 15, 19]
    drawn = [index for step in range(20) for index in step_samples(plan, step)]
    assert sorted(drawn[:32]) == sorted(drawn[32:64]) == [sample.index for sample in samples]
    assert len(set(drawn[64:])) == 16


@pytest.mark.parametrize("size", [BatchSize(tokens=60), BatchSize(tokens=30, accumulation=2, ranks=2)], ids=str)
def test_batches_by_tokens_have_pocl_s_steps_over_the_measured_order_or_else_over_the_file_s(size):
    samples = samples_of(90)
    pocl = schedule(samples, size)
    assert schedule(samples, size, curriculum="reverse").total_steps == pocl.total_steps
    assert schedule(samples, size, stage_length="equal").total_steps == pocl.total_steps
    assert schedule(samples, size, pacing="competence").total_steps == pocl.total_steps
    in_file_order = np.array([sample.index for sample in samples])
    of_file = Schedule(baby_steps(in_file_order, np.zeros(90)), pocl.lengths, size, epochs=2).total_steps
    for kind in ("none", "random", "length"):
        assert schedule(samples, size, curriculum=kind).total_steps == of_file
    exact = {schedule(samples, size, curriculum=kind, steps_per_stage=11).total_steps for kind in KINDS}
    assert exact == {44}


def test_stages_of_equal_steps_share_all_steps_and_go_round_their_samples():
    samples = samples_of(32)
    plan = schedule(samples, stages=3, stage_length="equal", epochs_per_stage=1)  # 10, 20, 32 samples: 3 + 5 + 8
    assert [plan.planned_steps(stage) for stage in range(3)] == [5, 5, 6]
    assert [plan.place(step).epoch for step in range(5)] == [0, 0, 0, 1, 1]
    assert plan.place(4).ends_epoch
    assert evenly(17, 4) == (4, 4, 4, 5)


# -- the orders --


def test_random_has_the_same_stages_over_an_order_that_follows_from_the_seed():
    samples = samples_of(50)
    pocl, once = schedule(samples), schedule(samples, curriculum="random")
    assert once.stages == pocl.stages
    order = once.curriculum.order.tolist()
    assert sorted(order) == [sample.index for sample in samples] != order
    assert schedule(samples, curriculum="random").curriculum.order.tolist() == order
    assert schedule(samples, curriculum="random", seed=1).curriculum.order.tolist() != order


def test_length_is_by_supervised_tokens_then_all_tokens_then_the_file_s_order():
    prompts_and_responses = [(5, 2), (1, 3), (2, 2), (5, 2), (9, 1)]
    samples = [EncodedSample(10 + i, (1,) * p, (2,) * r, False) for i, (p, r) in enumerate(prompts_and_responses)]
    samples.append(EncodedSample(20, (1,) * 8, (2,) * 5, False, supervised=((3, 4), (9, 10))))  # 2 of 13
    curriculum = unmeasured_curriculum(samples, Settings("length", stages=2), seed=0)
    assert curriculum.order.tolist() == [14, 12, 10, 13, 20, 11]
    assert curriculum.score.tolist() == [1, 2, 2, 2, 2, 3]


def test_a_line_says_what_a_control_is():
    assert control_line(Settings()) == ""
    assert control_line(Settings("none", stages=1)) == ""  # which is what pocl does in one stage
    assert control_line(Settings("none")) == (
        "curriculum none: all samples from the start, for as many steps as the 4 stages of pocl have; temperature 1 and"
        " alpha 0.3 throughout (temperature and alpha: the first value given)"
    )
    said = control_line(Settings("none", temperature=[2.0], alpha=[0.1, 0.2]))
    assert "temperature 2 and alpha 0.1 throughout (alpha: the first value given)" in said
    assert "pacing competence: the easiest 10 % at first" in control_line(Settings(pacing="competence"))
    for kind in ("random", "reverse", "length"):
        assert control_line(Settings(kind)).startswith(f"curriculum {kind}: the 4 stages of pocl, ")


# -- competence --


def test_competence_grows_as_published():
    """c(0) = c₀, c(T) = 1, and c² grows linearly between."""
    competence = Competence(0.2, 0.5)
    assert [competence.share(done) for done in (0, 0.5, 1)] == pytest.approx([0.2, 1, 1])
    assert competence.share(0.25) ** 2 == pytest.approx((0.2**2 + 1) / 2)
    assert [Competence(0.1, 0.5).allowed(done, 100) for done in (0, 0.5)] == [10, 100]
    assert Competence(0.01, 1).allowed(0, 5) == 1


def draws(samples=60, steps=50, budget=4, weights=None, seed=3, initial=0.1, full=0.6):
    return Draws(Competence(initial, full), weights or [1] * samples, budget, steps=steps, seed=seed)


@given(st.integers(1, 80), st.integers(1, 60), st.integers(1, 20), st.floats(0.01, 1), st.floats(0.05, 1))
def test_competence_draws_within_the_share_none_twice_and_evenly(samples, steps, budget, initial, full):
    made = draws(samples, steps, budget, initial=initial, full=full)
    counts = np.zeros(samples, dtype=int)
    came = np.full(samples, -1)
    for step in range(steps):
        allowed = made.allowed(step)
        came[:allowed][came[:allowed] < 0] = step
        ranks = made.step(step)
        assert len(ranks) == min(budget, allowed)
        assert len(set(ranks.tolist())) == len(ranks)
        assert ranks.max() < allowed
        counts[ranks] += 1
    for step in set(came.tolist()) - {-1}:
        together = counts[came == step]
        assert np.ptp(together) <= 1
    after = counts[came >= 0]  # easiest first: one that came in later was never drawn more than once more
    assert all(later <= earlier.min() + 1 for earlier, later in ((after[:i], after[i]) for i in range(1, len(after))))


def test_competence_with_all_samples_from_the_start_is_shuffled_passes():
    made = draws(20, 15, 4, initial=1.0)
    drawn = [made.step(step).tolist() for step in range(15)]
    passes = [sorted(itertools.chain(*drawn[i : i + 5])) for i in (0, 5, 10)]
    assert passes == [list(range(20))] * 3
    assert drawn[:5] != drawn[5:10]


def test_competence_draws_each_sample_about_as_often_as_its_expectation():
    """Drawing evenly among the allowed, a sample of rank r is drawn Σ batch / allowed(t) times over the steps that
    allow it."""
    made = draws(400, 1000, 16, initial=0.1, full=0.6)
    counts, want = np.zeros(400), np.zeros(400)
    for step in range(1000):
        counts[made.step(step)] += 1
        want[: made.allowed(step)] += 16 / made.allowed(step)
    assert np.abs(counts - want).max() < 1.5  # iid draws: a standard deviation of 6
    assert want.max() > 2 * want.min()


def test_competence_by_tokens_fills_the_budget_with_those_that_are_due():
    weights = np.random.default_rng(0).integers(1, 30, 60).tolist()
    made = draws(60, 40, 50, weights=weights)
    for step in range(40):
        ranks = made.step(step).tolist()
        assert sum(weights[rank] for rank in ranks) <= 50
        assert max(ranks) < made.allowed(step)


PACES = [
    {"curriculum": "none"},
    {"curriculum": "random", "stage_length": "equal"},
    {"curriculum": "reverse"},
    {"curriculum": "length", "pacing": "competence"},
    {"pacing": "competence", "within_stage": "linear"},
]


@pytest.mark.parametrize("size", [BatchSize(4), BatchSize(2, accumulation=2, ranks=2), BatchSize(tokens=60)], ids=str)
@pytest.mark.parametrize("pace", PACES, ids=str)
def test_a_step_s_samples_and_settings_follow_from_its_number_alone(pace, size):
    samples = samples_of(50)
    plan = schedule(samples, size, **pace)
    forward = [(plan.place(step), step_samples(plan, step)) for step in range(plan.total_steps)]
    again = schedule(samples, size, **pace)  # as after a stop: the late steps first
    backward = [(again.place(step), step_samples(again, step)) for step in reversed(range(plan.total_steps))]
    assert backward[::-1] == forward
    assert again.identity() == plan.identity()
    if size.tokens is None:
        other = schedule(samples, BatchSize(size.samples * size.parts), **pace)
        assert [sorted(step_samples(other, step)) for step in range(plan.total_steps)] == [
            sorted(s) for _, s in forward
        ]


def test_competence_stages_have_equal_steps_and_say_what_they_may_draw():
    samples = samples_of(200)
    plan = schedule(samples, pacing="competence", stages=5, full_competence=0.7)
    steps = [plan.planned_steps(stage) for stage in range(5)]
    assert max(steps) - min(steps) <= 1
    assert [stage.temperature for stage in plan.stages] == [1, 1.25, 1.5, 1.75, 2]
    allowed = [stage.size for stage in plan.stages]
    assert allowed == sorted(allowed)
    assert allowed[3:] == [200, 200]
    for step in range(plan.total_steps):
        place = plan.place(step)
        assert set(step_samples(plan, step)) <= set(plan.subset(place.stage).tolist())
    ends = [step + 1 for step in range(plan.total_steps) if plan.place(step).ends_epoch and plan.place(step).stage == 0]
    assert ends == [*range(50, steps[0], 50), steps[0]]  # a pass is 200 samples drawn, 50 steps of 4


def test_steps_of_a_competence_stage_that_ended_early_are_left_out_and_the_rest_stays():
    samples = samples_of(60)
    plan = schedule(samples, pacing="competence")
    first = plan.planned_steps(0)
    before = [step_samples(plan, step) for step in range(plan.total_steps)]
    plan.end_stage(0, first - 3)
    assert [step_samples(plan, step) for step in range(plan.total_steps)] == before[: first - 3] + before[first:]


def test_another_pace_is_another_schedule():
    samples = samples_of(60)
    changes = ({}, {"stage_length": "equal"}, {"pacing": "competence"}, {"curriculum": "none"})
    more = ({"pacing": "competence", "initial_competence": 0.2}, {"curriculum": "random"})
    found = [schedule(samples, **change).identity() for change in (*changes, *more)]
    assert all(found.count(one) == 1 for one in found)


def test_more_stages_than_samples_leave_a_training_without_a_curriculum_possible():
    samples = samples_of(3)
    assert schedule(samples, curriculum="none").total_steps == 6
    with pytest.raises(InputError, match="3 samples cannot fill 4 stages"):
        schedule(samples, pacing="competence")
