"""The rank step: the order that the signals give, and what it leaves and says."""

import shutil

import numpy as np
import pyarrow.parquet as pq
from tiny_run import options, refusal, run, select

from pocl_fast.curriculum.fusion import reciprocal_rank_fusion
from pocl_fast.curriculum.stages import Curriculum


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


def test_without_a_curriculum_there_is_one_stage_in_file_order(finished, tmp_path):
    inputs, _ = finished
    output = tmp_path / "out"
    words = options(inputs, curriculum="none", temperature=(1.5, 2.0), alpha=(0.25, 0.0))
    assert run("distill", output, *words) == 0
    curriculum = Curriculum.load(output / "curriculum.json")
    assert curriculum.order.tolist() == list(range(24))
    assert [(s.size, s.temperature, s.alpha) for s in curriculum.stages] == [(24, 1.5, 0.25)]


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
