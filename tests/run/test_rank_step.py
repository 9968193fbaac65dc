"""The rank step: the order that the signals give, and what it leaves and says."""

import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import options, refusal, run, select

from pocl_fast.curriculum.fusion import reciprocal_rank_fusion
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.training.metrics import read_metrics


def test_ranking_leaves_a_table_and_a_picture(finished, tmp_path, capsys):
    _, output = finished
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "curriculum.json").unlink()
    capsys.readouterr()
    assert run("rank", copy) == 0
    said = capsys.readouterr().out
    assert "rank correlation of rouge_l and cross_entropy: " in said
    assert [line.split()[:3] for line in said.splitlines()[2:6]] == [[str(i), str(6 * i), "6"] for i in (1, 2, 3, 4)]
    assert (copy / "difficulty.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_curriculum_nothing_is_measured_and_there_is_one_stage_in_file_order(finished, tmp_path, capsys):
    inputs, done = finished
    output = tmp_path / "out"
    words = options(inputs, curriculum="none", temperature=(1.5, 2.0), alpha=(0.25, 0.0))
    capsys.readouterr()
    assert run("distill", output, *words) == 0
    said = capsys.readouterr().out
    assert "measure: left out, for --curriculum none does not rank by difficulty" in said
    assert "temperature 1.5 and alpha 0.25 throughout (temperature and alpha: the first value given)" in said
    curriculum = Curriculum.load(output / "curriculum.json")
    assert curriculum.order.tolist() == list(range(24))
    assert [(s.size, s.temperature, s.alpha) for s in curriculum.stages] == [(24, 1.5, 0.25)]
    assert not (output / "difficulty.parquet").exists()
    assert steps_of(output) == steps_of(done)
    page = (output / "report.html").read_text()
    assert "Difficulty of the training samples" not in page
    assert "curriculum none: all samples from the start" in page
    assert run("distill", output, *words) == 0  # all done
    assert "rank: already done" in capsys.readouterr().out


def steps_of(output):
    """The optimizer steps that a run did."""
    return max(record["step"] for record in read_metrics(output / "metrics.jsonl"))


def test_an_order_that_is_not_measured_is_the_same_for_other_layers_of_the_student(finished, tmp_path, capsys):
    words = select(options(finished[0], curriculum="random", student_layers=2), "rank")
    assert run("rank", tmp_path / "out", *words) == 0
    assert run("rank", tmp_path / "out", *words, "--layer-choice", "importance") == 0
    assert "rank: already done" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["random", "length"])
def test_an_order_that_is_not_measured_can_be_the_first_step_of_a_run(finished, tmp_path, capsys, kind):
    inputs, _ = finished
    output = tmp_path / "out"
    words = options(inputs, curriculum=kind, seed=5)
    assert run("rank", output, *select(words, "rank"), "--seed", "5") == 0
    curriculum = Curriculum.load(output / "curriculum.json")
    assert [stage.size for stage in curriculum.stages] == [6, 12, 18, 24]
    order = curriculum.order.tolist()
    assert sorted(order) == list(range(24)) != order
    said = refusal(capsys, "train", output, *select(words, "train"), "--seed", "6") if kind == "random" else ""
    assert (
        not said or "its step 'rank', which 'train' builds on, was made with other input (seed: was 5, now 6)" in said
    )
    assert run("train", output, *select(words, "train")) == 0
    assert run("report", output) == 0
    named = {"random": ["first", "second", "third"], "length": ["shortest", "middle", "longest"]}[kind]
    assert re.findall(r"<summary>(\w+):", (output / "report.html").read_text()) == named
    said = refusal(capsys, "distill", output, *options(inputs, curriculum="none", seed=5))
    assert "its step 'rank' was made with other input" in said


def test_reverse_is_the_measured_order_turned_round(copied, capsys):
    _, output = copied
    before = Curriculum.load(output / "curriculum.json")
    assert run("rank", output, "--curriculum", "reverse", "--restart") == 0
    said = capsys.readouterr().out
    assert "24 samples in 4 stages, hard to easy" in said
    assert "rank: curriculum reverse: the 4 stages of pocl, the hardest samples first" in said
    after = Curriculum.load(output / "curriculum.json")
    assert after.order.tolist() == before.order.tolist()[::-1]
    assert after.score.tolist() == before.score.tolist()[::-1]
    assert after.stages == before.stages
    assert run("report", output) == 0
    assert "The hardest, the middle and the easiest of the samples" in (output / "report.html").read_text()


def test_competence_shows_what_each_stage_may_draw_at_its_end(copied, capsys):
    _, output = copied
    order = Curriculum.load(output / "curriculum.json").order.tolist()
    pacing = ("--pacing", "competence", "--initial-competence", "0.2", "--full-competence", "0.4")
    assert run("rank", output, *pacing, "--restart") == 0
    after = Curriculum.load(output / "curriculum.json")
    assert after.order.tolist() == order
    assert [stage.size for stage in after.stages] == [20, 24, 24, 24]  # c(0.25) = √(0.96 · 0.25 / 0.4 + 0.04) = 0.8
    assert "the easiest 20 % at first, growing to all of them after 40 % of the steps" in capsys.readouterr().out
    assert run("report", output) == 0  # stages 3 and 4 add no samples
    assert "pacing competence: the easiest 20 % at first" in (output / "report.html").read_text()


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


def test_a_signal_that_tells_little_is_named_with_what_to_do_and_in_the_report(copied, monkeypatch, capsys):
    _, output = copied
    monkeypatch.chdir(output)
    (output / "flat_signal.py").write_text("def score(record):\n    return 3\n")
    capsys.readouterr()
    assert run("rank", output, "--signals", "flat_signal:score,cross_entropy=2", "--restart") == 0
    said = capsys.readouterr().out
    line = (
        "flat_signal:score: all 24 samples have one score, 3, so it does not tell which of these is harder: leave it"
        " out: --signals cross_entropy=2"
    )
    assert f"rank: {line}" in said.splitlines()
    assert run("report", output) == 0
    page = (output / "report.html").read_text()
    assert line in page
    assert "largest group of samples with one score: flat_signal:score 100 %, cross_entropy " in page


def test_a_signal_that_was_not_measured_says_what_to_do(copied, capsys):
    _, output = copied
    said = refusal(capsys, "rank", output, "--signals", "mean_kl", "--restart")
    assert "lacks the columns ['mean_kl']" in said
    assert "give `pocl-fast measure` the same --signals" in said
    said = refusal(capsys, "rank", output, "--signals", "rougel", "--restart")
    assert "no signal named 'rougel'" in said
