"""A run is read as its files say, and a folder that cannot be compared is one message with what to do."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_compared import make_run, make_scores

from pocl_fast.reports.compared_runs import read_run
from pocl_fast.system.errors import InputError


def test_means_of_samples_are_those_of_the_evaluation(tmp_path):
    run = read_run(make_run(tmp_path / "run", better=3))
    said = json.loads((tmp_path / "run/evaluation.json").read_text())["sets"]["dev"]["scores"]
    [scores] = run.sets.values()
    assert scores.samples == 40
    for metric in ("rouge_l", "exact_match", "cross_entropy", "mean_kl"):
        assert scores.mean(metric) == pytest.approx(said["after"][metric], rel=1e-12)
        assert scores.before[metric] == said["before"][metric]
        assert scores.teacher[metric] == said["teacher"][metric]


def test_the_budget_and_the_curves_are_read_from_the_logs(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=20, seconds=75.5))
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (run.steps, run.seconds, run.seed) == (20, 75.5, 1)
    curve = run.curve("rouge_l")
    assert curve.steps.tolist() == [5, 10, 15, 20]
    assert curve.values.tolist() == [line["eval_rouge_l"] for line in logged if "eval_rouge_l" in line]


def test_a_warm_up_is_a_part_of_the_budget(tmp_path):
    folder = make_run(tmp_path / "run", steps=20, seconds=75.5)
    (folder / "warmup").mkdir()
    (folder / "warmup/metrics.jsonl").write_text('{"step": 5}\n{"step": 7}\n')
    stamps = json.loads((folder / "steps.json").read_text())
    (folder / "steps.json").write_text(json.dumps({"warmup": {"seconds": 4.5, "made_from": {}}} | stamps))
    run = read_run(folder)
    assert (run.steps, run.seconds) == (27, 80)
    assert run.curve("rouge_l").steps.max() == 20


def test_a_warm_up_that_logged_nothing_counts_by_its_stamp(tmp_path):
    folder = make_run(tmp_path / "run", steps=20)
    stamps = json.loads((folder / "steps.json").read_text())
    (folder / "steps.json").write_text(json.dumps({"warmup": {"steps": 9, "made_from": {}}} | stamps))
    assert read_run(folder).steps == 29


def test_a_run_without_logs_has_no_curves_and_no_steps(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=None))
    assert run.steps is None
    assert run.curve("cross_entropy").steps.size == 0


def test_a_step_that_was_evaluated_twice_counts_as_it_was_last(tmp_path):
    folder = make_run(tmp_path / "run", steps=5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "eval_rouge_l": 77.0}) + "\n" + '{"step": 6, "eval_rou')  # cut by a crash
    curve = read_run(folder).curve("rouge_l")
    assert (curve.steps.tolist(), curve.values.tolist()) == ([5], [77.0])


def test_a_metric_that_a_sample_lacks_is_left_out(tmp_path):
    without = make_scores(5, mean_kl=[0.1, None, 0.2, 0.3, 0.4])
    assert set(read_run(make_run(tmp_path / "kl", sets={"dev": without})).sets["devdevdevdev"].values) == {
        "rouge_l", "exact_match", "cross_entropy",
    }  # fmt: skip
    diverged = make_scores(3, cross_entropy=[1.0, float("nan"), 2.0])
    assert (
        "cross_entropy" not in read_run(make_run(tmp_path / "nan", sets={"dev": diverged})).sets["devdevdevdev"].values
    )


def test_options_that_were_not_recorded_have_their_defaults(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = (folder / "config.yaml").read_text().splitlines()
    (folder / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("divergence:")))
    assert read_run(folder).config["divergence"] == "forward_kl"


def refused(path):
    with pytest.raises(InputError) as error:
        read_run(path)
    return str(error.value)


def test_a_folder_that_is_not_there_is_named_with_one_like_it(tmp_path):
    make_run(tmp_path / "run_one")
    said = refused(tmp_path / "run_oen")
    assert f"there is no folder {tmp_path / 'run_oen'} (did you mean {tmp_path / 'run_one'}?)" in said


def test_a_folder_that_is_no_run_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert f"{tmp_path} holds no run: it has no config.yaml" in refused(tmp_path)
    assert "holds no run" in refused(tmp_path / "notes.txt")


def change(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")


def edit(folder, change_it):
    results = json.loads((folder / "evaluation.json").read_text())
    change_it(results["sets"]["dev"])
    change(folder, "evaluation.json", json.dumps(results))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "evaluation.json").unlink(), "is not evaluated yet: it has no evaluation.json; run `pocl-"),
        (lambda run: edit(run, lambda one: one["scores"].pop("after")), "has no scores after training; run `pocl-fast"),
        (lambda run: change(run, "evaluation.json", '{"before": {}, "after": {}}'), "is of an earlier version"),
        (lambda run: change(run, "evaluation.json", '{"sets": '), "evaluation.json is damaged: Expecting value"),
        (lambda run: change(run, "evaluation.json", "[]"), "evaluation.json is damaged: expected an object, got list"),
        (lambda run: edit(run, lambda one: one.pop("fingerprint")), "the set dev has no fingerprint or no seeds"),
        (lambda run: change(run, "steps.json", "{"), "steps.json is damaged"),
        (lambda run: change(run, "config.yaml", "a: [1"), "cannot read"),
        (lambda run: change(run, "config.yaml", "- 1"), "expected options as `name: value` lines, got list"),
        (lambda run: (run / "scores/dev-after.parquet").unlink(), "the scores of each sample; run `pocl-fast evaluate"),
        (lambda run: change(run, "scores/dev-after.parquet", "PAR1"), "cannot read"),
    ],
)  # fmt: skip
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, damage, says):
    folder = make_run(tmp_path / "run")
    damage(folder)
    said = refused(folder)
    assert says in said
    assert str(folder) in said


def test_a_table_without_a_column_is_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    path = folder / "scores/dev-after.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["tokens", "rouge_l"]), path)
    assert "dev-after.parquet has no column tokens, rouge_l; it has line, prompt" in refused(folder)


def test_a_table_of_another_evaluation_is_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    pq.write_table(pa.table(make_scores(better=9)), folder / "scores/dev-after.parquet")
    said = refused(folder)
    assert "are of two evaluations: rouge_l on dev is" in said
    assert np.isfinite(float(said.split(" on dev is ")[1].split(" and ")[0]))
