"""Signals that tell little are named, each once, with what to do."""

import numpy as np
import pytest

from pocl_fast.curriculum.blind_signals import average_ranks, correlations, largest_group, signal_lines
from pocl_fast.curriculum.scores import SignalScores
from pocl_fast.curriculum.signals import Signal, Weighted, chosen_signals

N = 1080
LOSS = np.random.default_rng(0).random(N)


def known(signals, *scores):
    return SignalScores(np.arange(len(scores[0])), tuple(chosen_signals(signals)), scores)


def said(signals, *scores):
    return [(line.reason, line.signals, line.text) for line in signal_lines(known(signals, *scores))]


def mostly(score, others):
    """N scores, of which all but some are `score`."""
    return np.concatenate([others, np.full(N - len(others), score)])


def test_answers_that_are_nearly_all_wrong_ask_for_a_warm_up_a_larger_student_or_the_other_signal():
    ((reason, names, text),) = said("rouge_l,cross_entropy=2", mostly(0.0, np.linspace(0.1, 0.9, 11)), LOSS)
    assert (reason, names) == ("tied", ("rouge_l",))
    assert text == (
        "rouge_l: 1,069 of 1,080 samples have one score, 0: the student answers nothing right yet (or ROUGE-L does not"
        " see the script of the references: see --rouge-tokenizer). Warm it up on the references first, or for"
        " longer (--warmup-epochs), take a larger student, or leave it out: --signals cross_entropy=2"
    )


def test_answers_that_are_nearly_all_right_ask_for_harder_samples():
    ((_, _, text),) = said("rouge_l,cross_entropy", mostly(1.0, np.linspace(0.1, 0.9, 11)), LOSS)
    assert "1,069 of 1,080 samples have one score, 1: the student answers these right already" in text
    assert text.endswith("--signals cross_entropy")


# more than half, not half; NaN is a score of its own; -0 is 0
@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (np.array([1, 1, 1, 2, 3.0]), "tied"),
        (np.array([1, 1, 2, 3.0]), None),
        (np.array([1, 1, 2, 2, 3.0, 3.0]), None),  # all share their score, and six are well ranked
        (np.array([0.0, -0.0, 0.0, 1.0]), "tied"),
        (np.array([np.inf, np.inf, np.inf, 1.0]), "tied"),
        (np.array([np.nan, np.nan, np.nan, 1.0]), "tied"),
        (np.full(4, np.nan), "constant"),
        (np.full(4, -np.inf), "constant"),
        (np.array([0.0, -0.0]), "constant"),
        (np.array([0.0]), None),
        (np.array([]), None),
        (np.array([np.nan, 1.0, 2.0]), "missing"),
    ],
)
def test_a_signal_is_tied_where_one_score_is_that_of_more_than_half_of_the_samples(scores, reason):
    assert [line[0] for line in said("answer_length", scores)] == ([] if reason is None else [reason])


def test_a_constant_signal_alone_is_to_be_replaced_and_of_two_there_is_no_order():
    ((reason, _, text),) = said("answer_length", np.full(9, 4.0))
    assert reason == "constant"
    assert text == (
        "answer_length: all 9 samples have one score, 4, so it does not tell which of these is harder: rank by another"
        " signal: --signals cross_entropy"
    )
    both = said("rouge_l,cross_entropy", np.zeros(9), np.ones(9))
    assert [line[0] for line in both] == ["constant", "constant"]
    assert all(line[2].endswith("train without an order: --curriculum none") for line in both)


def test_a_signal_without_scores_is_named_with_how_many_and_once():
    half = np.where(np.arange(N) < 700, np.nan, LOSS)
    ((reason, _, text),) = said("mean_kl,cross_entropy", half, LOSS)
    assert (reason, text.split(".")[0]) == ("tied", "mean_kl: 700 of 1,080 samples have no score")
    few = np.where(np.arange(N) < 7, np.nan, LOSS)
    ((reason, _, text),) = said("mean_kl,cross_entropy", few, LOSS)
    assert (reason, text) == ("missing", "mean_kl: 7 of 1,080 samples have no score by it; they rank last by it")


def test_two_signals_that_do_not_agree_are_named_in_one_line():
    ((reason, names, text),) = said("rouge_l,cross_entropy", LOSS, LOSS)  # the easy ends are opposite
    assert (reason, names) == ("uncorrelated", ("rouge_l", "cross_entropy"))
    assert "rouge_l and cross_entropy: their rank correlation is -1.00, below 0.05" in text
    assert text.endswith("--signals rouge_l or --signals cross_entropy")
    assert said("rouge_l,cross_entropy", -LOSS, LOSS) == []


def test_a_signal_that_agrees_with_none_of_several_is_named_with_the_nearest():
    other = np.random.default_rng(1).permutation(N).astype(float)
    ((reason, names, text),) = said("mean_kl,cross_entropy=2,answer_length", other, LOSS, LOSS**2)
    assert (reason, names) == ("uncorrelated", ("mean_kl",))
    assert "--signals cross_entropy=2,answer_length; or rank by it alone: --signals mean_kl" in text


def test_one_signal_and_one_beside_blind_ones_have_no_other_to_agree_with():
    assert said("cross_entropy", LOSS) == []
    lines = said("rouge_l,cross_entropy", mostly(0.0, [0.5]), LOSS)
    assert [line[:2] for line in lines] == [("tied", ("rouge_l",))]
    lines = said("rouge_l,cross_entropy", np.zeros(N), LOSS)
    assert [line[:2] for line in lines] == [("constant", ("rouge_l",))]


def test_a_function_of_one_s_own_is_named_as_it_was_given():
    own = Weighted(Signal("my.module:score", lambda record: 0, "low", None, "my.module:score", one_by_one=True))
    signals = (own, *chosen_signals("cross_entropy"))
    (line,) = signal_lines(SignalScores(np.arange(N), signals, (np.zeros(N), LOSS)))
    assert line.text.startswith("my.module:score: all 1,080 samples have one score, 0, so it")


def test_the_largest_group_is_the_most_frequent_score():
    rng = np.random.default_rng(2)
    for _ in range(200):
        scores = rng.choice([0.0, -0.0, 1.5, -3.0, np.inf, np.nan], rng.integers(1, 12))
        counts = {}
        for score in scores.tolist():
            key = "nan" if score != score else score + 0.0
            counts[key] = counts.get(key, 0) + 1
        group = largest_group(scores)
        assert group.samples == max(counts.values())
        assert counts["nan" if np.isnan(group.score) else group.score] == group.samples


def test_correlations_are_spearman_s():
    # the formula without ties, 1 - 6 Σ d² / (n (n² - 1)); and by hand with one
    rng = np.random.default_rng(3)
    a, b = rng.permutation(50) + 0.0, rng.permutation(50) + 0.0
    want = 1 - 6 * ((a - b) ** 2).sum() / (50 * (50**2 - 1))
    found = correlations(known("cross_entropy,mean_kl,rouge_l,answer_length", a, b, a, np.zeros(50)))
    np.testing.assert_allclose(found[0, :3], [1, want, -1], atol=1e-12)
    assert np.isnan(found[3]).all()
    tied = correlations(known("cross_entropy,mean_kl", np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])))
    np.testing.assert_allclose(tied[0, 1], 1.5 / np.sqrt(1.5 * 2), atol=1e-12)  # ranks 1.5 1.5 3 against 1 2 3
    assert average_ranks(np.array([np.nan, 1.0, np.nan])).tolist() == [2.5, 1.0, 2.5]
