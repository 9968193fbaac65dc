"""Rank fusion against a NumPy twin, and the schedule of stages."""

import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from turns import turns_during

from pocl_fast.curriculum.stages import Curriculum, Stage, baby_steps, no_curriculum, reciprocal_rank_fusion
from pocl_fast.system.errors import InputError


def numpy_fusion(scores, descending, k=60.0, weights=None):
    """The definition, by stable argsorts: NaN last, ties by index."""
    fused = np.zeros(len(scores[0]))
    for array, high_is_easy, weight in zip(scores, descending, weights or [1.0] * len(scores), strict=True):
        array = np.asarray(array, dtype=np.float64)
        fused += weight / (k + ranks(np.argsort(-array if high_is_easy else array, kind="stable")))
    order = np.argsort(-fused, kind="stable")
    return fused, ranks(order), order


def ranks(order):
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return rank


def assert_fused_as_in_numpy(scores, descending, k=60.0, weights=None, threads=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = reciprocal_rank_fusion(scores, descending=descending, k=k, weights=weights, threads=threads)
    score, rank, order = numpy_fusion(scores, descending, k, weights)
    np.testing.assert_array_equal(ours.score, score)
    np.testing.assert_array_equal(ours.rank, rank)
    np.testing.assert_array_equal(ours.order, order)
    assert (ours.score.dtype, ours.rank.dtype, ours.order.dtype) == (np.float64, np.int64, np.int64)


# few distinct values make ties; the others are where keys go wrong: zeros, denormals, infinities, NaN of either sign
AWKWARD = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 5e-324, 1e30, np.inf, -np.inf, np.nan, -np.nan]


@st.composite
def rankings(draw):
    n, count = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    elements = {
        32: st.floats(width=32),
        64: st.one_of(st.floats(), st.sampled_from(AWKWARD), st.integers(0, 3).map(float)),
    }
    scores = [
        draw(hnp.arrays(np.dtype(f"f{bits // 8}"), n, elements=elements[bits]))
        for bits in draw(st.lists(st.sampled_from([32, 64]), min_size=count, max_size=count))
    ]
    descending = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    weights = draw(st.none() | st.lists(st.floats(0, 10), min_size=count, max_size=count))
    return scores, descending, draw(st.floats(1e-3, 1e6)), weights


@settings(max_examples=300, deadline=None)
@given(rankings())
def test_any_scores_fuse_as_in_numpy(drawn):
    assert_fused_as_in_numpy(*drawn)


# 32767 and 65536: one chunk of the sort and two; 200001: odd, and more chunks than threads would need
@pytest.mark.parametrize("n", [1, 2, 1000, 32767, 65536, 200_001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_scores_fuse_as_in_numpy_on_any_number_of_threads(n, dtype):
    rng = np.random.default_rng(n)
    scores = [
        rng.standard_normal(n).astype(dtype),
        np.round(rng.random(n), 2).astype(dtype),  # ties
        np.where(rng.random(n) < 0.1, np.nan, rng.standard_normal(n)).astype(dtype),
    ]
    for threads in (1, 2, 5):
        assert_fused_as_in_numpy(scores, [True, False, True], weights=[1.0, 0.5, 2.0], threads=threads)


# scores that agree in their leading bits are sorted in another way: 3 values far apart, n neighbours of each
@pytest.mark.parametrize("n", [5, 100, 50_000])
def test_scores_that_differ_in_their_last_bits_fuse_as_in_numpy(n):
    rng = np.random.default_rng(n)
    near = np.array([-7.0, 1.0, 1e300])[:, None] * (1 + np.arange(n) % 1000 * np.finfo(np.float64).eps)
    scores = rng.permutation(near.ravel())
    for threads in (1, 2, 5):
        for high_is_easy in (True, False):
            assert_fused_as_in_numpy([scores, scores[::-1]], [high_is_easy, True], threads=threads)


def peak_growth(before, then):
    """Bytes by which the peak memory of a process of its own grew in `then`, after `before`; Python source both."""
    code = f"""
from pathlib import Path
import numpy as np
from pocl_fast.curriculum.stages import baby_steps, reciprocal_rank_fusion
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
{before}
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
start = peak()
{then}
print(peak() - start)
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@on_linux
def test_a_fusion_takes_32_bytes_a_sample_beyond_its_inputs():
    n = 8_000_000
    grown = peak_growth(
        f"scores = [np.random.default_rng(0).random({n}), np.random.default_rng(1).random({n}, dtype=np.float32)]\n"
        # threads and libraries are there
        "reciprocal_rank_fusion([s[:100_000] for s in scores], descending=[True, False])",
        "fused = reciprocal_rank_fusion(scores, descending=[True, False])",
    )
    assert 24 < grown / n < 33.5  # 24 are the results; each array ends within a huge page


@on_linux
def test_saving_a_curriculum_takes_no_memory_a_sample(tmp_path):
    n = 500_000
    grown = peak_growth(
        f"made = baby_steps(np.random.default_rng(0).permutation({n}), np.random.default_rng(1).random({n}))",
        f"made.save({str(tmp_path / 'curriculum.json')!r})",
    )
    assert grown < 5_000_000  # as lists it would be 40,000,000
    loaded = Curriculum.load(tmp_path / "curriculum.json")
    np.testing.assert_array_equal(loaded.order, np.random.default_rng(0).permutation(n))
    np.testing.assert_array_equal(loaded.score, np.random.default_rng(1).random(n))


def test_ties_keep_the_earlier_sample_first():
    equal = np.full(5, 0.25)
    fused = reciprocal_rank_fusion([equal, equal], descending=[True, False])
    assert fused.order.tolist() == [0, 1, 2, 3, 4]
    assert fused.rank.tolist() == [1, 2, 3, 4, 5]
    # ranks 1, 2 and 2, 1: the same fused score
    fused = reciprocal_rank_fusion([np.array([2.0, 1.0]), np.array([1.0, 2.0])], descending=[True, True])
    assert fused.score[0] == fused.score[1]
    assert fused.order.tolist() == [0, 1]


def test_other_python_threads_run_meanwhile():
    scores = [np.random.default_rng(i).random(3_000_000) for i in range(2)]  # some tenths of a second
    worker = threading.Thread(
        target=reciprocal_rank_fusion, args=(scores,), kwargs={"descending": [True, False], "threads": 1}
    )
    assert turns_during(worker) > 20


def test_minus_zero_equals_zero():
    for dtype in (np.float32, np.float64):
        scores = np.array([0.0, -0.0, 0.0, -0.0], dtype=dtype)
        for descending in (True, False):
            assert reciprocal_rank_fusion([scores], descending=[descending]).order.tolist() == [0, 1, 2, 3]


def test_nan_ranks_last_in_either_direction_and_is_counted():
    scores = np.array([np.nan, 1.0, np.nan, np.inf, -np.inf])
    for descending, order in ((True, [3, 1, 4, 0, 2]), (False, [4, 1, 3, 0, 2])):
        with pytest.warns(UserWarning, match=r"scores\[1\]: 2 of 5 are NaN"):
            fused = reciprocal_rank_fusion([np.zeros(5), scores], descending=[True, descending], weights=[0, 1])
        assert fused.order.tolist() == order


def test_one_sample_has_rank_one():
    fused = reciprocal_rank_fusion([[0.3], [2.0]], descending=[True, False])
    assert (fused.score.tolist(), fused.rank.tolist(), fused.order.tolist()) == ([2 / 61], [1], [0])


def test_no_samples_fuse_to_empty_arrays():
    fused = reciprocal_rank_fusion([np.empty(0)], descending=[True])
    assert fused.score.shape == fused.rank.shape == fused.order.shape == (0,)


def test_the_paper_s_formula_by_hand():
    # ROUGE-L ranks 2, 1, 3; cross-entropy ranks 1, 3, 2
    fused = reciprocal_rank_fusion([[0.5, 0.9, 0.1], [1.0, 3.0, 2.0]], descending=[True, False])
    np.testing.assert_array_equal(fused.score, [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 63 + 1 / 62])
    assert fused.order.tolist() == [0, 1, 2]


def test_strided_and_integer_scores_are_read_as_they_are():
    table = np.arange(12).reshape(6, 2)[::-1]
    assert_fused_as_in_numpy([table[:, 0], table[:, 1].astype(np.float32)], [True, False])


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {"descending": []}, "at least one array"),
        ([[1.0, 2.0], [1.0]], {"descending": [True, True]}, r"one length, got \[2, 1\]"),
        ([[[1.0, 2.0]]], {"descending": [True]}, r"scores\[0\] must be a 1-D array of numbers, got shape \(1, 2\)"),
        ([["a", "b"]], {"descending": [True]}, r"scores\[0\] must be a 1-D array of numbers"),
        ([[1.0, None]], {"descending": [True]}, r"scores\[0\] must be a 1-D array of numbers"),
        ([1.0, 2.0], {"descending": [True, True]}, r"scores\[0\] must be a 1-D array of numbers, got shape \(\)"),
        ([[1.0]], {"descending": [True, False]}, "descending needs one flag for each array of scores: 1, not 2"),
        (
            [[1.0]],
            {"descending": [True], "weights": [1, 2]},
            "weights needs one number for each array of scores: 1, not 2",
        ),
        ([[1.0]], {"descending": [True], "weights": [-1.0]}, r"not negative, got \[-1.0\]"),
        ([[1.0]], {"descending": [True], "weights": [np.nan]}, "weights must be finite"),
        ([[1.0]], {"descending": [True], "k": 0}, "k must be positive and finite, got 0"),
        ([[1.0]], {"descending": [True], "k": np.nan}, "k must be positive"),
        ([[1.0]], {"descending": [True], "threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_wrong_rankings_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        reciprocal_rank_fusion(scores, **options)


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
