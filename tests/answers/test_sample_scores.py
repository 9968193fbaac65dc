"""Summaries of scores of single samples against the same computed by hand, and the table that keeps them."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from pocl_fast.answers.intervals import bootstrap_interval
from pocl_fast.answers.sample_scores import Asked, SampleScores, read_scores, write_scores
from pocl_fast.system.errors import InputError


def scores(samples=3, **changed):
    """Scores of three samples under two seeds, or of the first of them."""
    given = {
        "answers": [["a", "b"], ["c", "d"], ["e", "f"]],
        "rouge_l": np.array([[100.0, 50.0], [0.0, 30.0], [20.0, 40.0]]),
        "exact_match": np.array([[True, False], [False, False], [True, True]]),
        "cross_entropy": np.array([1.0, 2.0, 4.0]),
        "tokens": np.array([10, 20, 30]),
        "mean_kl": np.array([0.5, 0.25, 0.125]),
    } | changed
    return SampleScores((7, 8), **{name: None if value is None else value[:samples] for name, value in given.items()})


def test_a_summary_has_means_over_samples_and_seeds_and_over_tokens():
    made = scores().summary()
    assert made.rouge_l == pytest.approx(40)
    assert made.rouge_l_spread == pytest.approx(0)  # 40 and 40
    assert made.exact_match == pytest.approx(50)
    assert made.cross_entropy == pytest.approx((10 + 40 + 120) / 60)
    assert made.perplexity == pytest.approx(math.exp(170 / 60))
    assert made.mean_kl == pytest.approx((5 + 5 + 3.75) / 60)
    assert (made.seeds, made.samples) == ((7, 8), 3)
    assert scores(rouge_l=np.array([[1.0, 2], [1, 2], [1, 5]])).summary().rouge_l_spread == pytest.approx(1.0)


def test_intervals_are_over_samples_of_their_means_over_seeds():
    made = scores().summary()
    _, *low_high = bootstrap_interval([75.0, 15.0, 30.0])
    assert made.rouge_l_interval == pytest.approx(low_high)
    _, *low_high = bootstrap_interval([50.0, 0.0, 100.0])
    assert made.exact_match_interval == pytest.approx(low_high)


def test_the_interval_of_the_cross_entropy_weighs_tokens_alike():
    """It is that of a ratio of sums over samples drawn anew, here drawn by other random numbers."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 50, size=40)
    loss = rng.gamma(2.0, size=40)
    repeated = SampleScores((1,), [["x"]] * 40, np.zeros((40, 1)), np.zeros((40, 1), bool), loss, tokens)
    drawn = rng.integers(40, size=(20_000, 40))
    means = (loss * tokens)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    made = repeated.summary()
    assert made.cross_entropy_interval == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=0.02)
    assert made.mean_kl is None


def test_one_sample_has_no_interval_and_neither_have_scores_that_are_no_numbers():
    one = scores(samples=1).summary()
    assert (one.rouge_l_interval, one.exact_match_interval, one.cross_entropy_interval) == (None, None, None)
    broken = scores(cross_entropy=np.array([1.0, math.inf, 2.0])).summary()
    assert broken.cross_entropy_interval is None
    assert broken.rouge_l_interval is not None


@pytest.mark.parametrize("kl", [np.array([0.5, 0.25, 0.125]), None])
def test_a_table_gives_back_what_was_written(tmp_path, kl):
    path, given = tmp_path / "scores" / "dev-after.parquet", scores(mean_kl=kl)
    asked = [Asked(line, f"prompt {line}", ("one", "two")) for line in (1, 5, 9)]
    write_scores(path, asked, given)
    assert [file.name for file in path.parent.iterdir()] == ["dev-after.parquet"]
    assert read_scores(path).summary() == given.summary()
    assert read_scores(path).answers == given.answers
    rows = pq.read_table(path).to_pylist()
    assert rows[1] == {
        "line": 5, "prompt": "prompt 5", "references": ["one", "two"], "answers": ["c", "d"], "rouge_l": [0.0, 30.0],
        "exact_match": [False, False], "cross_entropy": 2.0, "tokens": 20, "mean_kl": None if kl is None else 0.25,
    }  # fmt: skip


def test_another_file_in_its_place_is_one_message(tmp_path):
    path = tmp_path / "dev-after.parquet"
    path.write_text("nothing")
    with pytest.raises(InputError, match=f"{path} is no table of scores .*: delete it to have it made again"):
        read_scores(path)
