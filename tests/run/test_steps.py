"""Runs from end to end: what they leave, that steps alone give the same, and that they go on where they stopped."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from tiny import arithmetic, tiny_model, write_jsonl
from tiny_run import OUTPUTS, options, refusal, run, select, weights

from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.settings.configuration import read_yaml


def state(folder):
    """Every file's content but that of the report and of the lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("report.html", ".lock"))
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_distill_leaves_every_file_of_its_steps(finished):
    _, output = finished
    table = pq.read_table(output / "difficulty.parquet")
    columns = ["index", "rouge_l", "cross_entropy", "answer_length", "prompt", "reference", "answer"]
    assert table.column_names == columns
    assert table["index"].to_pylist() == list(range(24))
    curriculum = Curriculum.load(output / "curriculum.json")
    assert sorted(curriculum.order.tolist()) == list(range(24))
    assert [(s.size, s.temperature, s.alpha) for s in curriculum.stages] == [
        (6, 1.0, 0.3),
        (12, 1.33, 0.2),
        (18, 1.67, 0.1),
        (24, 2.0, 0.0),
    ]
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records if "eval_rouge_l" in r] == [(0, 2), (1, 5), (2, 10), (3, 16)]
    assert [(r["stage"], r["step"]) for r in records if "loss" in r] == [
        (0, 1),
        (0, 2),
        (1, 5),
        (2, 10),
        (3, 15),
        (3, 16),
    ]
    kept = [f"stage-{stage}-best-{step}.safetensors" for stage, step in ((1, 2), (2, 5), (3, 10), (4, 16))]
    assert [p.name for p in sorted((output / "checkpoints").iterdir())] == kept
    assert not list(output.rglob("*.partial*"))


def test_the_same_command_again_does_nothing(copied, capsys):
    inputs, output = copied
    before = state(output)
    capsys.readouterr()
    assert run("distill", output, *options(inputs)) == 0
    said = capsys.readouterr().out
    assert state(output) == before
    for step in ("measure", "evaluate-before", "evaluate-teacher", "rank", "train", "evaluate-after"):
        assert f"{step}: already done" in said
    assert said.count("report: ") == 1


def test_the_steps_one_by_one_give_the_same_bits_as_distill(finished, tmp_path):
    inputs, whole = finished
    output = tmp_path / "steps"
    for command in ("measure", "rank", "train", "evaluate", "report"):
        assert run(command, output, *select(options(inputs), command)) == 0
    for name in OUTPUTS:
        if name != "metrics.jsonl":  # holds times
            assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert (output / "report.html").stat().st_size > 10_000


def test_the_recorded_configuration_makes_the_same_run_elsewhere(finished, tmp_path):
    _, output = finished
    again = tmp_path / "again"
    assert run("measure", again, "--config", str(output / "config.yaml")) == 0
    assert run("rank", again) == 0
    assert read_yaml(again / "config.yaml") == read_yaml(output / "config.yaml")
    assert (again / "curriculum.json").read_bytes() == (output / "curriculum.json").read_bytes()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"learning_rate": 0.5}, "'train' was made with other input (learning_rate: was 0.0001, now 0.5)"),
        ({"eval_seeds": (1,)}, "'evaluate-before' was made with other input (eval_seeds: was [10, 20], now [1])"),
        ({"stages": 2}, "'rank' was made with other input (stages: was 4, now 2)"),
        ({"student_layers": 3}, "'measure' was made with other input (student_layers: was 2, now 3)"),
    ],
)
def test_a_changed_option_never_meets_an_old_result(copied, capsys, changed, says):
    inputs, output = copied
    before = state(output)
    said = refusal(capsys, "distill", output, *options(inputs, **changed))
    assert f"{output} holds another run: its step {says}" in said
    assert state(output) == before


def test_changed_data_or_weights_never_meet_an_old_result(copied, capsys, tmp_path):
    inputs, output = copied
    other = shutil.copytree(inputs, tmp_path / "inputs")
    write_jsonl(other / "train.jsonl", arithmetic(24, start=1))
    said = refusal(capsys, "distill", output, *options(inputs, train=other / "train.jsonl"))
    assert "(train data: was " in said
    tiny_model(layers=4, seed=1).save_pretrained(other / "teacher")
    said = refusal(capsys, "distill", output, *options(inputs, teacher=other / "teacher"))
    assert f"student: was cut from {inputs / 'teacher'} (" in said
    assert f"now cut from {other / 'teacher'} (" in said


def test_restart_does_the_changed_steps_again_and_keeps_the_others(copied):
    inputs, output = copied
    measured, before = (output / "difficulty.parquet").stat().st_mtime_ns, weights(output)
    assert run("distill", output, *options(inputs, learning_rate=0.01), "--restart") == 0
    assert (output / "difficulty.parquet").stat().st_mtime_ns == measured
    assert weights(output) != before
    assert {r["step"] for r in map(json.loads, (output / "metrics.jsonl").open()) if r["stage"] == 3} == {15, 16}


def test_a_deleted_result_is_made_again_with_the_same_bits(copied):
    inputs, output = copied
    before = (output / "difficulty.parquet").read_bytes(), weights(output)
    (output / "difficulty.parquet").unlink()
    shutil.rmtree(output / "student")
    assert run("distill", output, *options(inputs)) == 0
    assert ((output / "difficulty.parquet").read_bytes(), weights(output)) == before


def test_a_step_that_failed_before_it_began_does_not_bind_its_options(finished, tmp_path, capsys):
    inputs, _ = finished
    output = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    refusal(capsys, "measure", output, *select(options(inputs, train=bad), "measure"))
    assert run("measure", output, *select(options(inputs), "measure")) == 0
