"""Methods are compared on the samples that all runs share, with the statistics that textbooks have."""

import math

import numpy as np
import pytest
from tiny_compared import make_run, make_scores

from pocl_fast.answers.intervals import paired_bootstrap
from pocl_fast.reports.compared_runs import read_run
from pocl_fast.reports.comparison import compare_runs, holm, linearised
from pocl_fast.system.errors import InputError

T_OF_3 = 4.302652729911275  # Student's t, 97.5 %, 2 degrees of freedom, of a table
FEW = 500  # resamples where the interval's width does not matter


@pytest.fixture
def made(tmp_path):
    def make(name, **options):
        return make_run(tmp_path / name, **options)

    return make


@pytest.fixture
def two(made):
    """Two methods of three seeds."""
    ours = [made(f"ours{seed}", seed=seed, better=3) for seed in (1, 2, 3)]
    return [*ours, *(made(f"flat{seed}", seed=seed, curriculum="none", better=1) for seed in (1, 2, 3))]


def refused(*given, **named):
    with pytest.raises(InputError) as error:
        compare_runs(*given, **named)
    return str(error.value)


def note(comparison, part):
    """The one note that says this."""
    [found] = [note for note in comparison.notes if part in note]
    return found


def test_a_method_of_several_seeds_has_students_interval_over_them(two):
    [dev] = compare_runs(two, resamples=FEW).sets
    means = np.array([read_run(path).sets["devdevdevdev"].mean("cross_entropy") for path in two[:3]])
    score = dev.scores["cross_entropy"][0]
    half = T_OF_3 * means.std(ddof=1) / math.sqrt(3)
    assert score.over == "training seeds"
    assert (score.mean, score.low, score.high) == pytest.approx(
        (means.mean(), means.mean() - half, means.mean() + half)
    )


def test_a_method_of_one_seed_has_an_interval_over_samples_and_that_is_said(made, two):
    comparison = compare_runs([*two, made("alone", divergence="jsd")], resamples=2000)
    score = comparison.sets[0].scores["rouge_l"][2]
    values = read_run(made("again")).sets["devdevdevdev"].values["rouge_l"]
    normal = 1.96 * values.std() / math.sqrt(len(values))
    assert score.over == "samples"
    assert (score.low, score.high) == pytest.approx((values.mean() - normal, values.mean() + normal), abs=0.15 * normal)
    assert "C has one seed: no interval over training seeds." in note(comparison, "no interval")
    assert "interval over 3 training seeds" in note(comparison, "Student's t")


def test_a_difference_is_the_paired_bootstraps_of_the_same_samples(two):
    [dev] = compare_runs(two, resamples=4000).sets
    ours, flat = (
        np.stack([read_run(path).sets["devdevdevdev"].values["rouge_l"] for path in paths])
        for paths in (two[:3], two[3:])
    )
    want = paired_bootstrap(ours, flat, resamples=4000, seed=5)
    [pair] = dev.pairs["rouge_l"]
    assert (pair.first, pair.second) == (0, 1)
    assert pair.difference == pytest.approx(want.mean)
    assert (pair.low, pair.high) == pytest.approx((want.low, want.high), abs=0.1 * (want.high - want.low))
    assert pair.p < 0.01


def test_a_difference_of_cross_entropies_weighs_tokens_alike(two):
    [dev] = compare_runs(two, resamples=FEW).sets
    means = [read_run(path).sets["devdevdevdev"].mean("cross_entropy") for path in two]
    assert dev.pairs["cross_entropy"][0].difference == pytest.approx(np.mean(means[:3]) - np.mean(means[3:]))


def test_values_made_linear_spread_as_quotients_of_resampled_sums_do(made):
    [scores] = read_run(made("run", sets={"dev": make_scores(300)})).sets.values()
    linear = linearised(scores, "cross_entropy")
    assert linear.mean() == pytest.approx(scores.mean("cross_entropy"))
    drawn = np.random.default_rng(0).integers(300, size=(4000, 300))
    values, tokens = scores.values["cross_entropy"], scores.tokens
    quotients = (values * tokens)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    assert linear[drawn].mean(axis=1).std() == pytest.approx(quotients.std(), rel=0.03)
    assert np.corrcoef(linear[drawn].mean(axis=1), quotients)[0, 1] > 0.995


def test_holms_rule_is_that_of_his_example():
    """Of 4 tests the least p counts 4 times, the next 3 times, and none less than one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_pairs_are_adjusted_for_their_number_and_that_is_said(made):
    runs = [made(f"m{n}", stages=n + 1, better=n / 3) for n in range(5)]
    comparison = compare_runs(runs, resamples=FEW)
    pairs = comparison.sets[0].pairs["rouge_l"]
    assert [(pair.first, pair.second) for pair in pairs] == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert [pair.adjusted_p for pair in pairs] == holm([pair.p for pair in pairs])
    assert "10 pairs are compared on 1 set" in note(comparison, "Holm's p is adjusted")


def test_many_pairs_have_so_many_resamples_that_an_adjusted_p_can_be_small(made):
    runs = [made(f"m{n}", stages=n + 1, better=20.0 * (n == 0)) for n in range(13)]
    comparison = compare_runs(runs)
    assert "15,600 resamples" in note(comparison, "paired bootstrap:")  # 200 for each of 78 pairs
    assert min(pair.adjusted_p for pair in comparison.sets[0].pairs["rouge_l"]) == pytest.approx(0.01, rel=1e-3)


def test_the_best_is_marked_and_what_does_not_differ_from_it(made):
    runs = [made("low", stages=2), made("best", stages=3, better=8), made("near", stages=5, better=7.99)]
    scores = compare_runs(runs, resamples=FEW).sets[0].scores
    assert [score.best for score in scores["rouge_l"]] == [False, True, True]
    assert [score.best for score in scores["cross_entropy"]] == [False, True, True]  # of which less is better


def test_sets_are_the_same_by_their_samples_whatever_they_are_called(made):
    one = make_scores(30)
    moved = make_scores(30, better=2, lines=range(101, 131))
    prints = {"dev": "f" * 64, "test_x": "f" * 64}
    runs = [
        made("a", sets={"dev": one}, fingerprints=prints),
        made("b", sets={"test_x": moved}, fingerprints=prints, stages=2),
    ]
    [only] = compare_runs(runs, resamples=FEW).sets
    assert (only.name, only.samples) == ("dev", 30)


def test_sets_that_not_all_runs_have_are_left_out_and_counted(made):
    both = {"dev": make_scores(20), "test_sni": make_scores(30)}
    runs = [made("a", sets=both), made("b", sets={"dev": make_scores(20)}, stages=2), made("c", sets=both, stages=3)]
    comparison = compare_runs(runs, resamples=FEW)
    assert [one.name for one in comparison.sets] == ["dev"]
    assert (
        "Left out: 1 set that is not scored in all 3 runs: test_sni (30 samples, fingerprint test_sni) in 2."
        in comparison.notes
    )


def test_test_sets_come_first_and_sets_that_chose_weights_last(made):
    sets = {name: make_scores(10) for name in ("dev", "news", "test_a")}
    comparison = compare_runs([made("a", sets=sets), made("b", sets=sets, stages=2)], resamples=FEW)
    assert [one.name for one in comparison.sets] == ["test_a", "news", "dev"]


def test_runs_of_different_data_are_refused_with_what_each_has(made):
    runs = [made("a", fingerprints={"dev": "1" * 64}), made("b", seed=2, fingerprints={"dev": "2" * 64})]
    said = refused(runs)
    assert "no data set is scored in all 2 runs" in said
    assert f"{runs[0]} has dev (40 samples of data/dev.jsonl, fingerprint 11111111)" in said
    assert f"{runs[1]} has dev (40 samples of data/dev.jsonl, fingerprint 22222222)" in said


def test_a_table_of_other_samples_than_its_fingerprint_says_is_refused(made):
    runs = [made("a"), made("b", sets={"dev": make_scores(39)}, stages=2)]
    assert "are of other samples than those of" in refused(runs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": (10, 20, 30)}, "--eval-seeds is 10 20 in {a} and 10 20 30 in {b}; evaluate one of them again:"),
        ({"max_new_tokens": 64}, "--max-new-tokens is 128 in {a} and 64 in {b}"),
        ({"rouge_tokenizer": "characters"}, "--rouge-tokenizer is rouge_score in {a} and characters in {b}"),
    ],
)
def test_runs_that_were_evaluated_in_different_ways_are_refused(made, options, says):
    a, b = made("a"), made("b", seed=2, **options)
    said = refused([a, b])
    assert says.format(a=a, b=b) in said
    assert f"`pocl-fast evaluate --output {b} --restart " in said


def test_one_run_alone_is_refused(made):
    path = made("a")
    assert f"give two or more run directories to compare, got {path} alone" in refused([path])
    assert "give two or more" in refused([])
    assert "give two or more" in refused({"ours": [path]})
    assert "give two or more" in refused({})


def test_one_method_of_two_runs_has_scores_and_no_pairs(made):
    comparison = compare_runs([made("a", seed=1), made("b", seed=2)])
    assert comparison.sets[0].pairs["rouge_l"] == []
    assert [score.best for score in comparison.sets[0].scores["rouge_l"]] == [False]
    assert note(comparison, "one method alone")


def test_methods_can_be_given_by_name(two):
    comparison = compare_runs({"with": two[:3], "without": two[3:]}, resamples=FEW)
    assert [(method.name, len(method.runs)) for method in comparison.methods] == [("with", 3), ("without", 3)]
    other = compare_runs({"mixed": [two[0], two[3]], "rest": [two[1]]}, resamples=FEW)
    assert "A: its runs differ in more than the seed: curriculum (pocl, none)." in other.notes
    assert "A: 2 runs have 1 training seed between them; the interval is over the runs." in other.notes


def test_unequal_budgets_are_said(made):
    runs = [made("a", steps=20), made("b", steps=35, stages=2), made("c", steps=None, stages=3)]
    comparison = compare_runs(runs, resamples=FEW)
    assert note(comparison, "budgets") == "The budgets are not equal. Optimizer steps: A 20, B 35."
    assert note(comparison, "metrics.jsonl") == "1 run without metrics.jsonl: the optimizer steps are not known."
    assert not [
        said for said in compare_runs([*runs[:1], made("d", stages=5)], resamples=FEW).notes if "budgets" in said
    ]


def test_a_set_that_chose_weights_is_named(made):
    comparison = compare_runs([made("a"), made("b", stages=2)], resamples=FEW)
    assert comparison.sets[0].chooses_weights
    assert note(comparison, "dev has chosen weights during training")
    other = compare_runs([made("c", chooses=()), made("d", stages=2, chooses=())], resamples=FEW)
    assert not [said for said in other.notes if "chosen" in said]


def test_nats_of_different_tokens_are_not_compared(made):
    other = make_scores(40, tokens=[7] * 40)
    comparison = compare_runs([made("a"), made("b", sets={"dev": other}, stages=2)], resamples=FEW)
    assert set(comparison.sets[0].scores) == {"rouge_l", "exact_match"}
    assert "cross-entropy and mean KL are not compared" in note(comparison, "by different tokenizers")


def test_a_method_without_a_metric_has_none_and_the_others_are_compared(made):
    without = make_scores(40, mean_kl=[None] * 40)
    runs = [made("a"), made("b", sets={"dev": without}, stages=2), made("c", stages=3, better=2)]
    comparison = compare_runs(runs, resamples=FEW)
    scores = comparison.sets[0].scores["mean_kl"]
    assert [score is None for score in scores] == [False, True, False]
    assert [(pair.first, pair.second) for pair in comparison.sets[0].pairs["mean_kl"]] == [(0, 2)]
    assert note(comparison, "dev: no mean KL of B")


def test_several_teachers_are_said(made):
    comparison = compare_runs([made("a"), made("b", teacher="models/other")], resamples=FEW)
    assert note(comparison, "2 teachers: mean KL is to each run's own")


def test_a_run_without_a_teacher_is_no_second_teacher(made):
    notes = compare_runs([made("a"), made("b", seed=2), made("c", teacher=None)], ["A", "A", "C"], resamples=FEW).notes
    assert not [note for note in notes if "teachers" in note]


def test_one_sample_alone_has_means_and_nothing_else(made):
    sets = {"dev": make_scores(1)}
    [dev] = compare_runs([made("a", sets=sets), made("b", sets=sets, stages=2)], resamples=FEW).sets
    assert (dev.scores["rouge_l"][0].low, dev.pairs["rouge_l"][0].p, dev.pairs["rouge_l"][0].adjusted_p) == (
        None,
        None,
        None,
    )


def test_the_student_before_and_the_teacher_are_given_as_they_were_scored(made):
    [dev] = compare_runs([made("a"), made("b", stages=2)], resamples=FEW).sets
    before = read_run(made("again")).sets["devdevdevdev"].before["rouge_l"]
    assert dev.before["rouge_l"] == (before, before)
    assert dev.teacher["rouge_l"][0] > dev.before["rouge_l"][0]
