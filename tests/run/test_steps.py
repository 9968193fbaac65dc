"""Runs from end to end: what they leave, that steps alone give the same, and that they go on where they stopped."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny import arithmetic, tiny_model, write_jsonl
from tiny_run import OUTPUTS, options, read_json, refusal, run, select, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_fast.answers import engine
from pocl_fast.curriculum.fusion import reciprocal_rank_fusion
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.run.configuration import read_yaml


@pytest.fixture
def copied(finished, tmp_path):
    inputs, output = finished
    return inputs, shutil.copytree(output, tmp_path / "copy")


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


def test_the_student_loads_with_transformers_and_has_the_weights_of_the_last_stage(finished):
    inputs, output = finished
    student = AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(output / "student").chat_template
    last = load_file(output / "checkpoints" / "stage-4-best-16.safetensors")
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in last.items())
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


def test_the_same_command_again_does_nothing(copied, capsys):
    inputs, output = copied
    before = state(output)
    capsys.readouterr()
    assert run("distill", output, *options(inputs)) == 0
    said = capsys.readouterr().out
    assert state(output) == before
    for step in ("measure", "evaluate-before", "rank", "train", "evaluate-after"):
        assert f"{step}: already done" in said


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


def test_train_refuses_data_that_was_not_measured(copied, capsys, tmp_path):
    inputs, output = copied
    shutil.rmtree(output / "student")  # so that training is to be done again
    other = write_jsonl(tmp_path / "other.jsonl", arithmetic(24, start=1))
    said = refusal(capsys, "train", output, *select(options(inputs, train=other), "train"))
    assert "'measure', which 'train' builds on, was made with other input (train data: was " in said
    few = write_jsonl(tmp_path / "few.jsonl", arithmetic(20))
    (output / "steps.json").unlink()
    said = refusal(capsys, "train", output, *select(options(inputs, train=few), "train"))
    assert f"curriculum.json lists sample 20, which --train {few} does not have" in said


def test_restart_does_the_changed_steps_again_and_keeps_the_others(copied):
    inputs, output = copied
    measured, before = (output / "difficulty.parquet").stat().st_mtime_ns, weights(output)
    assert run("distill", output, *options(inputs, learning_rate=0.01), "--restart") == 0
    assert (output / "difficulty.parquet").stat().st_mtime_ns == measured
    assert weights(output) != before
    assert {r["step"] for r in map(json.loads, (output / "metrics.jsonl").open()) if r["stage"] == 3} == {15, 16}


def test_a_restarted_training_takes_the_old_students_scores_away(copied):
    inputs, output = copied
    assert run("train", output, *select(options(inputs, learning_rate=0.01), "train"), "--restart") == 0
    assert sorted(read_json(output / "evaluation.json")) == ["before"]
    assert not (output / "answers-after.jsonl").exists()


def test_a_deleted_result_is_made_again_with_the_same_bits(copied):
    inputs, output = copied
    before = (output / "difficulty.parquet").read_bytes(), weights(output)
    (output / "difficulty.parquet").unlink()
    shutil.rmtree(output / "student")
    assert run("distill", output, *options(inputs)) == 0
    assert ((output / "difficulty.parquet").read_bytes(), weights(output)) == before


def test_an_interrupted_measure_goes_on_and_keeps_its_finished_parts(finished, tmp_path, monkeypatch, capsys):
    inputs, whole = finished
    output, generate, asked = tmp_path / "out", engine.generate, []

    def interrupted(model, prompts, **kwargs):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(model, prompts, **kwargs)

    monkeypatch.setattr(engine, "generate", interrupted)
    words = select(options(inputs), "measure")
    assert run("measure", output, *words) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert asked == [8]
    assert [p.name for p in (output / "difficulty.parts" / "000000").iterdir()] == ["000000.parquet"]

    def counted(model, prompts, **kwargs):
        asked.append(len(prompts))
        return generate(model, prompts, **kwargs)

    monkeypatch.setattr(engine, "generate", counted)
    assert run("measure", output, *words) == 0
    assert asked == [8, 8, 8]
    assert (output / "difficulty.parquet").read_bytes() == (whole / "difficulty.parquet").read_bytes()
    assert not (output / "difficulty.parts").exists()


def test_a_step_that_failed_before_it_began_does_not_bind_its_options(finished, tmp_path, capsys):
    inputs, _ = finished
    output = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    refusal(capsys, "measure", output, *select(options(inputs, train=bad), "measure"))
    assert run("measure", output, *select(options(inputs), "measure")) == 0


def test_without_a_curriculum_there_is_one_stage_in_file_order(finished, tmp_path):
    inputs, _ = finished
    output = tmp_path / "out"
    words = options(inputs, curriculum="none", temperature=(1.5, 2.0), alpha=(0.25, 0.0))
    assert run("distill", output, *words) == 0
    curriculum = Curriculum.load(output / "curriculum.json")
    assert curriculum.order.tolist() == list(range(24))
    assert [(s.size, s.temperature, s.alpha) for s in curriculum.stages] == [(24, 1.5, 0.25)]


def test_skipped_and_cut_samples_are_counted_and_left_out_or_kept(finished, tmp_path, capsys):
    inputs, _ = finished
    records = arithmetic(12)
    records[3]["instruction"] = "long " * 30
    records[5]["output"] = "b" * 200
    train = write_jsonl(tmp_path / "train.jsonl", records)
    output = tmp_path / "out"
    assert run("distill", output, *options(inputs, train=train, long_prompts="skip", stages=2)) == 0
    said = capsys.readouterr().out
    assert f"{train}: 11 samples; 1 skipped for a prompt over the limit (line 4);" in said
    assert "1 response cut to the length limit (line 6)" in said
    index = pq.read_table(output / "difficulty.parquet")["index"].to_pylist()
    assert index == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert sorted(Curriculum.load(output / "curriculum.json").order.tolist()) == index


def test_signals_are_measured_where_they_need_the_teacher_and_ranked_by(finished, tmp_path, monkeypatch, capsys):
    inputs, _ = finished
    output = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_signal.py").write_text("def length(record):\n    return len(record['prompt'])\n")
    signals = ("--signals", "mean_kl=2,cross_entropy_gap,own_signal:length")
    assert run("measure", output, *select(options(inputs), "measure"), *signals) == 0
    table, teacher = (pq.read_table(output / f"{name}.parquet") for name in ("difficulty", "teacher_scores"))
    assert min(teacher["mean_kl"].to_pylist()) > 0
    assert run("rank", output) == 0  # as recorded by measure
    lengths = [len(prompt) for prompt in table["prompt"].to_pylist()]
    fused = reciprocal_rank_fusion(
        [
            teacher["mean_kl"].to_numpy(),
            table["cross_entropy"].to_numpy() - teacher["teacher_cross_entropy"].to_numpy(),
            np.array(lengths),
        ],
        descending=[False] * 3,
        weights=[2.0, 1.0, 1.0],
    )
    assert Curriculum.load(output / "curriculum.json").order.tolist() == fused.order.tolist()
    said = refusal(capsys, "rank", output, "--signals", "answer_length")
    assert "signals: was mean_kl=2,cross_entropy_gap,own_signal:length, now answer_length" in said
    assert run("rank", output, "--signals", "answer_length", "--restart") == 0
    order = Curriculum.load(output / "curriculum.json").order
    assert order.tolist() == np.argsort(table["answer_length"].to_numpy(), kind="stable").tolist()


def test_a_signal_that_was_not_measured_says_what_to_do(copied, capsys):
    _, output = copied
    said = refusal(capsys, "rank", output, "--signals", "mean_kl", "--restart")
    assert "lacks the columns ['mean_kl']" in said
    assert "give `pocl-fast measure` the same --signals" in said
    said = refusal(capsys, "rank", output, "--signals", "rougel", "--restart")
    assert "no signal named 'rougel'" in said


def test_ranking_leaves_a_table_and_a_picture(finished, tmp_path, capsys):
    _, output = finished
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "curriculum.json").unlink()
    capsys.readouterr()
    assert run("rank", copy) == 0
    said = capsys.readouterr().out
    assert "rank correlation of rouge_l and cross_entropy: " in said
    assert [line.split()[:2] for line in said.splitlines()[1:5]] == [[str(i), "6"] for i in (1, 2, 3, 4)]
    assert (copy / "difficulty.png").read_bytes().startswith(b"\x89PNG")
