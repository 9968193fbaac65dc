"""Rank fusion against a NumPy twin."""

import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peak_growth import on_linux, peak_growth
from turns import turns_during

from pocl_fast.curriculum.fusion import reciprocal_rank_fusion

TIES = ("average", "first")


def numpy_fusion(scores, descending, k=60.0, weights=None, ties="average"):
    """The definition, by stable argsorts: NaN last, ties by index or sharing the mean of their ranks."""
    fused = np.zeros(len(scores[0]))
    for array, high_is_easy, weight in zip(scores, descending, weights or [1.0] * len(scores), strict=True):
        array = np.asarray(array, dtype=np.float64)
        rank = ranks(np.argsort(-array if high_is_easy else array, kind="stable"))
        if ties == "average":
            _, group, count = np.unique(array, return_inverse=True, return_counts=True)  # NaN equals NaN
            rank = (np.bincount(group, rank) / count)[group] if len(array) else rank
        fused += weight / (k + rank)
    order = np.argsort(-fused, kind="stable")
    return fused, ranks(order), order


def ranks(order):
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return rank


def assert_fused_as_in_numpy(scores, descending, k=60.0, weights=None, threads=None):
    for ties in TIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = reciprocal_rank_fusion(
                scores, descending=descending, k=k, weights=weights, ties=ties, threads=threads
            )
        score, rank, order = numpy_fusion(scores, descending, k, weights, ties)
        np.testing.assert_array_equal(ours.score, score)
        np.testing.assert_array_equal(ours.rank, rank)
        np.testing.assert_array_equal(ours.order, order)
        assert (ours.score.dtype, ours.rank.dtype, ours.order.dtype) == (np.float64, np.int64, np.int64)
        assert ours.tied == sum(count for count in np.unique(score, return_counts=True)[1] if count > 1)


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


@on_linux
def test_a_fusion_takes_32_bytes_a_sample_beyond_its_inputs():
    n = 8_000_000
    grown = peak_growth(
        f"from pocl_fast.curriculum.fusion import reciprocal_rank_fusion\n"
        f"scores = [np.random.default_rng(0).random({n}), np.random.default_rng(1).random({n}, dtype=np.float32)]\n"
        # threads and libraries are there
        "reciprocal_rank_fusion([s[:100_000] for s in scores], descending=[True, False])",
        "fused = reciprocal_rank_fusion(scores, descending=[True, False])",
    )
    assert 24 < grown / n < 33.5  # 24 are the results; each array ends within a huge page


# groups that lie across the chunks of the sort: two values, one in 1000 apart, and all alike
@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0] * 999 + [1.0], [0.0, -0.0], [np.nan], [np.nan, 2.0, 2.0, np.inf]])
def test_large_groups_of_ties_fuse_as_in_numpy_on_any_number_of_threads(values):
    rng = np.random.default_rng(0)
    scores = [rng.choice(values, 150_001), rng.choice(values, 150_001).astype(np.float32)]
    for threads in (1, 2, 4):
        assert_fused_as_in_numpy(scores, [True, False], weights=[1.0, 3.0], threads=threads)


def test_ties_share_the_mean_of_their_ranks_or_keep_the_earlier_sample_first():
    scores = [np.array([0.5, 0.9, 0.5, 0.5, 0.1])]  # ranks 2, 3, 4 are of the three
    average = reciprocal_rank_fusion(scores, descending=[True])
    np.testing.assert_array_equal(average.score, 1 / (60 + np.array([3.0, 1.0, 3.0, 3.0, 5.0])))
    first = reciprocal_rank_fusion(scores, descending=[True], ties="first")
    np.testing.assert_array_equal(first.score, 1 / (60 + np.array([2.0, 1.0, 3.0, 4.0, 5.0])))
    assert (average.tied, first.tied) == (3, 0)
    assert average.order.tolist() == first.order.tolist() == [1, 0, 2, 3, 4]


def test_what_all_samples_share_lets_the_other_ranking_decide():
    loss = np.random.default_rng(0).random(1000)
    mostly_zero = np.where(np.arange(1000) < 10, 0.5, 0.0)
    want = [i for i in np.argsort(loss).tolist() if i >= 10]
    for ties in TIES:
        order = reciprocal_rank_fusion([mostly_zero, loss], descending=[True, False], ties=ties).order
        assert ([i for i in order.tolist() if i >= 10] == want) == (ties == "average")


def test_missing_scores_share_the_mean_of_the_last_ranks():
    with pytest.warns(UserWarning, match="2 of 4 are NaN"):
        fused = reciprocal_rank_fusion([np.array([np.nan, 3.0, np.nan, 1.0])], descending=[False])
    np.testing.assert_array_equal(fused.score, 1 / (60 + np.array([3.5, 2.0, 3.5, 1.0])))


@pytest.mark.parametrize("ties", TIES)
def test_equal_fused_scores_keep_the_earlier_sample_first(ties):
    equal = np.full(5, 0.25)
    fused = reciprocal_rank_fusion([equal, equal], descending=[True, False], ties=ties)
    assert fused.order.tolist() == [0, 1, 2, 3, 4]
    assert fused.rank.tolist() == [1, 2, 3, 4, 5]
    # ranks 1, 2 and 2, 1: the same fused score
    fused = reciprocal_rank_fusion([np.array([2.0, 1.0]), np.array([1.0, 2.0])], descending=[True, True], ties=ties)
    assert fused.score[0] == fused.score[1]
    assert (fused.order.tolist(), fused.tied) == ([0, 1], 2)


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
        ([[1.0]], {"descending": [True], "ties": "mean"}, "ties must be one of average, first, got 'mean'"),
        ([[1.0]], {"descending": [True], "threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_wrong_rankings_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        reciprocal_rank_fusion(scores, **options)
