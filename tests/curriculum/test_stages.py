"""The schedule of stages, and its file."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peak_growth import on_linux, peak_growth

from pocl_fast.curriculum.stages import Curriculum, Stage, baby_steps, no_curriculum
from pocl_fast.system.errors import InputError


@on_linux
def test_saving_a_curriculum_takes_no_memory_a_sample(tmp_path):
    n = 500_000
    grown = peak_growth(
        f"from pocl_fast.curriculum.stages import baby_steps\n"
        f"made = baby_steps(np.random.default_rng(0).permutation({n}), np.random.default_rng(1).random({n}))",
        f"made.save({str(tmp_path / 'curriculum.json')!r})",
    )
    assert grown < 5_000_000  # as lists it would be 40,000,000
    loaded = Curriculum.load(tmp_path / "curriculum.json")
    np.testing.assert_array_equal(loaded.order, np.random.default_rng(0).permutation(n))
    np.testing.assert_array_equal(loaded.score, np.random.default_rng(1).random(n))


def test_the_default_stages_are_the_paper_s():
    curriculum = baby_steps(np.arange(103), np.zeros(103))
    assert curriculum.stages == (
        Stage(0, 25, 1.0, 0.3),
        Stage(1, 50, 1.33, 0.2),
        Stage(2, 75, 1.67, 0.1),
        Stage(3, 103, 2.0, 0.0),
    )


@given(st.integers(1, 12), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_stages_are_cumulative_and_end_with_all_samples(stages, more, seed):
    order = np.random.default_rng(seed).permutation(stages + more)
    curriculum = baby_steps(order, np.zeros(len(order)), stages=stages)
    sizes = [stage.size for stage in curriculum.stages]
    assert sizes == [len(order) // stages * (i + 1) for i in range(stages - 1)] + [len(order)]
    for i, size in enumerate(sizes):
        np.testing.assert_array_equal(curriculum.subset(i), order[:size])


def test_settings_are_one_for_each_stage_or_first_and_last():
    samples = np.arange(9), np.zeros(9)
    given_each = baby_steps(*samples, stages=3, temperatures=(1, 3, 1.005), alphas=(1, 0, 0.001))
    assert [(s.temperature, s.alpha) for s in given_each.stages] == [(1, 1), (3, 0), (1.005, 0.001)]
    # the ends are taken as given, only what lies between them is rounded
    spread = baby_steps(*samples, stages=4, temperatures=(1.005, 2), alphas=(0.001, 1))
    assert [(s.temperature, s.alpha) for s in spread.stages] == [(1.005, 0.001), (1.34, 0.33), (1.67, 0.67), (2, 1)]
    single = baby_steps(*samples, stages=1)
    assert [(s.size, s.temperature, s.alpha) for s in single.stages] == [(9, 1, 0.3)]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (3, {}, "3 samples cannot fill 4 stages"),
        (0, {"stages": 1}, "0 samples cannot fill 1 stages"),
        (9, {"stages": 0}, "stages must be at least 1, got 0"),
        (9, {"temperatures": (0.0, 1.0)}, "stage 0: temperature must be positive and finite, got 0.0"),
        (9, {"temperatures": (1.0, np.nan)}, "temperature must be positive"),
        (9, {"temperatures": (1.0, 2.0, 3.0)}, "one for each of 4 stages, got 3 values"),
        (9, {"alphas": (0.3, -0.1)}, "stage 3: alpha must be within 0 to 1, got -0.1"),
        (9, {"alphas": (1.1, 0.0)}, "stage 0: alpha must be within 0 to 1, got 1.1"),
    ],
)
def test_wrong_schedules_are_named(samples, options, message):
    with pytest.raises(ValueError, match=message):
        baby_steps(np.arange(samples), np.zeros(samples), **options)


def test_an_order_must_list_each_sample_once_with_a_score():
    with pytest.raises(ValueError, match="each sample index once"):
        baby_steps(np.array([0, 1, 2, 2]), np.zeros(4))
    with pytest.raises(ValueError, match="of one length"):
        baby_steps(np.arange(4), np.zeros(5))


def test_no_curriculum_is_one_stage_of_all_samples():
    curriculum = no_curriculum(7, temperature=1.5, alpha=0.25)
    assert curriculum.stages == (Stage(0, 7, 1.5, 0.25),)
    assert curriculum.subset(0).tolist() == list(range(7))
    for wrong in ({"num_samples": 0}, {"temperature": 0}, {"alpha": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            no_curriculum(**{"num_samples": 7, "temperature": 1.0, "alpha": 0.0, **wrong})


def test_a_saved_curriculum_loads_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    order = rng.permutation(1000)[:900]  # with gaps, as where samples were left out
    made = baby_steps(order, rng.random(900) / 7, stages=5)
    made.save(tmp_path / "curriculum.json")
    loaded = Curriculum.load(tmp_path / "curriculum.json")
    np.testing.assert_array_equal(loaded.order, made.order)
    np.testing.assert_array_equal(loaded.score, made.score)
    assert loaded.stages == made.stages
    assert loaded.order.dtype == np.int64
    assert [path.name for path in tmp_path.iterdir()] == ["curriculum.json"]


def changed(**parts):
    return lambda record: {**record, **parts}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: [], "is not a curriculum"),
        (lambda record: {"order": [0]}, "it lacks 'stages'"),
        (changed(order=[0, 1, 1, 3]), "each sample index once"),
        (changed(order=[0.5, 1, 2, 3]), "as integers"),
        (changed(score=[1.0, 2.0]), "of one length"),
        (changed(stages=[]), "sizes must rise"),
        (changed(stages=[{"index": 0, "size": 5, "temperature": 1.0, "alpha": 0.0}]), r"all 4 samples, got \[5\]"),
        (changed(stages=[{"index": 1, "size": 4, "temperature": 1.0, "alpha": 0.0}]), "stage 0 has the index 1"),
        (changed(stages=[{"index": 0, "size": 4, "temperature": -1.0, "alpha": 0.0}]), "temperature must be positive"),
        (changed(stages=[{"index": 0, "size": "4", "temperature": 1.0, "alpha": 0.0}]), "is not a curriculum"),
        (changed(stages=[{"index": 0, "size": 4}]), "is not a curriculum"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "curriculum.json"
    no_curriculum(4, temperature=1.0, alpha=0.0).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message) as caught:
        Curriculum.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_cut_file_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="run `pocl-fast rank` first"):
        Curriculum.load(tmp_path / "curriculum.json")
    (tmp_path / "curriculum.json").write_text('{"order": [0, 1')
    with pytest.raises(InputError, match="delete it and run `pocl-fast rank` again"):
        Curriculum.load(tmp_path / "curriculum.json")
