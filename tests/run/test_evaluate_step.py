"""The evaluate step: its scores and answers, and that ranks make those of one process."""

import json

import pytest
from ranks import gloo
from tiny_run import make_inputs, options, read_json, run, select

from pocl_fast.system import ranks


def test_evaluation_holds_the_scores_before_and_after_and_training_lowered_the_loss(finished):
    _, output = finished
    results = read_json(output / "evaluation.json")
    assert sorted(results) == ["after", "before"]
    for scores in results.values():
        assert (scores["seeds"], scores["samples"]) == ([10, 20], 8)
    assert results["after"]["cross_entropy"] < results["before"]["cross_entropy"] - 0.02
    answers = [json.loads(line) for line in (output / "answers-after.jsonl").read_text().splitlines()]
    assert [a["line"] for a in answers] == list(range(1, 9))
    assert answers[0]["references"] == ["100"]


def _evaluated(output, words):
    assert run("evaluate", output, *words) == 0
    return ranks.rank()


@gloo
def test_ranks_evaluate_what_one_process_evaluates(two_ranks, tmp_path, tmp_path_factory):
    inputs = make_inputs(tmp_path_factory.mktemp("evaluated"))
    words = select(options(inputs, generation_batch_size=3), "evaluate")
    assert run("evaluate", tmp_path / "one", *words) == 0
    assert two_ranks(_evaluated, tmp_path / "two", words) == [0, 1]
    one, two = ((tmp_path / name / "answers-before.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    one, two = (read_json(tmp_path / name / "evaluation.json")["before"] for name in ("one", "two"))
    assert two.pop("cross_entropy") == pytest.approx(one.pop("cross_entropy"), rel=1e-6)
    assert one == two
