"""The report and the terminal's table say what the run directory holds, whole or in part."""

import base64
import html
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import arithmetic, write_jsonl
from tiny_run import options, read_json, run, select

from pocl_fast.reports.report import (
    ScoreRow,
    StepRow,
    result_rows,
    step_rows,
    summary_table,
    training_figure,
    write_report,
)
from pocl_fast.system.errors import InputError


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def table_rows(text):
    """The cells of every table row, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "copy")


def test_the_report_holds_the_scores_the_steps_and_the_stages(finished):
    _, output = finished
    results = read_json(output / "evaluation.json")
    rows = table_rows(page(output))
    cells = [f"{results[when]['cross_entropy']:.3f}" for when in ("before", "after")]
    assert ["cross-entropy, nats a token", *cells] in rows
    steps = ["measure", "evaluate-before", "rank", "train", "evaluate-after", "in all"]
    assert [row[0] for row in rows if row[-1].endswith("GiB")] == steps
    header = rows.index(["stage", "samples", "temperature", "alpha", "held-out ROUGE-L", "held-out cross-entropy"])
    stages = rows[header + 1 : header + 5]
    settings = [
        ["1", "6", "1.0", "0.3"],
        ["2", "12", "1.33", "0.2"],
        ["3", "18", "1.67", "0.1"],
        ["4", "24", "2.0", "0.0"],
    ]
    assert [row[:4] for row in stages] == settings
    last = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][-1]
    assert stages[-1][4:] == [f"{last['eval_rouge_l']:.2f}", f"{last['eval_cross_entropy']:.3f}"]


def test_the_report_is_one_file_with_both_pictures_in_it(finished):
    text = page(finished[1])
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 2
    for picture in pictures:
        data = base64.b64decode(picture)
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_the_report_has_the_difficulty_of_each_stage_and_three_samples_of_it(finished):
    _, output = finished
    rows = table_rows(page(output))
    table = pq.read_table(output / "difficulty.parquet").to_pylist()
    order = read_json(output / "curriculum.json")["order"]
    header = rows.index(["stage", "new samples", "mean rouge_l", "mean cross_entropy"])
    for stage, row in enumerate(rows[header + 1 : header + 5]):
        new = [record for record in table if record["index"] in order[6 * stage : 6 * stage + 6]]
        means = [f"{np.mean([record[name] for record in new]):.3f}" for name in ("rouge_l", "cross_entropy")]
        assert row == [str(stage + 1), "6", *means]
    texts = ["prompt", "reference", "the student's answer before training"]
    header = rows.index(["stage", "rouge_l", "cross_entropy", *texts])
    shown = rows[header + 1 : header + 13]
    assert [row[0] for row in shown] == [str(stage) for stage in (1, 2, 3, 4) for _ in range(3)]
    picked = [order[6 * stage + place] for stage in range(4) for place in (0, 3, 5)]
    record_of = {record["index"]: record for record in table}
    assert [row[3] for row in shown] == [record_of[index]["prompt"] for index in picked]
    assert [row[2] for row in shown] == [f"{record_of[index]['cross_entropy']:.3f}" for index in picked]


def test_the_report_says_what_the_scores_are_of(finished, tmp_path):
    text = page(finished[1])
    assert "8 samples, 2 sampled answers each; ± is the spread over the seeds" in text
    (tmp_path / "steps.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("")
    assert "sampled answers" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_the_report_shows_three_samples_as_the_model_sees_them(finished):
    inputs, output = finished
    order = read_json(output / "curriculum.json")["order"]
    titles = re.findall(r"<summary>(.*?)</summary>", page(output))
    picked = {"easiest": order[0], "middle": order[12], "hardest": order[-1]}
    assert titles == [f"{name}: {inputs / 'train.jsonl'}, line {index + 1}" for name, index in picked.items()]
    table = {record["index"]: record for record in pq.read_table(output / "difficulty.parquet").to_pylist()}
    for shown, index in zip(page(output).split("<details>")[1:], picked.values(), strict=True):
        said = re.findall(r'<span class="supervised[^>]*>(.*?)</span>', shown)
        assert "".join(map(html.unescape, said)).replace("␣", " ") == table[index]["reference"] + "<|end|>"


def test_the_report_has_the_lengths_and_what_the_limits_cut(finished):
    text = page(finished[1])
    lengths = read_json(finished[1] / "steps.json")["train"]["sample_lengths"]
    assert sum(lengths["samples"]["counts"]) == sum(lengths["prompts"]["counts"]) == 24
    assert text.count('<svg class="lengths"') == 2
    assert f'<p class="note">{finished[0] / "train.jsonl"}: 24 samples' in text
    assert f"longest {lengths['samples']['quantiles']['100']}; 0 of 24 are over --max-length 96" in text


# the file is gone; it has changed; the file of the template is gone
def test_a_report_is_written_without_samples_that_cannot_be_shown_any_more(copied):
    config = (copied / "config.yaml").read_text()
    train = re.search(r"^train: (.*)$", config, re.MULTILINE)[1]
    changed = write_jsonl(copied.parent / "changed.jsonl", arithmetic(25))
    cases = {
        "cannot read nowhere.jsonl: No such file": config.replace(train, "nowhere.jsonl"),
        f"{changed} has changed since the run read it": config.replace(train, str(changed)),
        "--chat-template gone.jinja: ": config.replace("chat_template: null", "chat_template: gone.jinja"),
    }
    for says, text in cases.items():
        (copied / "config.yaml").write_text(text)
        page = html.unescape(write_report(copied).read_text(encoding="utf-8"))
        assert f"They cannot be shown any more: {says}" in page
        assert "<details>" not in page
        assert "<h2>Lengths</h2>" in page


def test_what_samples_say_is_never_markup_in_the_report(finished, tmp_path):
    inputs, _ = finished
    records = [record | {"output": "</span><script>alert(1)</script>"} for record in arithmetic(4)]
    train = write_jsonl(tmp_path / "<i>.jsonl", records)
    words = select(options(inputs, train=train), "measure")
    assert run("measure", tmp_path / "out", *words) == 0
    assert run("report", tmp_path / "out") == 0
    text = page(tmp_path / "out")
    assert text.count("<summary>") == 3
    assert re.findall(r"<summary>(\w+):", text) == ["first", "second", "third"]
    assert "<script>" not in text
    assert "<i>" not in text


def test_before_ranking_the_first_samples_that_are_trained_on_are_shown_and_what_was_left_out_is_said(
    finished, tmp_path
):
    inputs, _ = finished
    records = [one | {"instruction": "Say " * 30} if n == 1 else one for n, one in enumerate(arithmetic(5))]
    train = write_jsonl(tmp_path / "train.jsonl", [{"output": "bad"}, *records])
    words = select(options(inputs, train=train), "measure")
    output = tmp_path / "out"
    assert run("measure", output, *words, "--bad-records", "skip", "--long-prompts", "skip") == 0
    assert run("report", output) == 0
    titles = re.findall(r"<summary>(\w+): .*?, line (\d+)</summary>", page(output))
    assert titles == [("first", "2"), ("second", "4"), ("third", "5")]
    said = html.unescape(page(output))
    assert f"{train}: 4 samples; 1 bad record left out" in said
    assert "1 of 5 are over --max-prompt-length 80: left out (--long-prompts skip)" in said


def test_the_picture_of_difficulty_is_the_one_in_the_run_directory(finished):
    _, output = finished
    picture = base64.b64encode((output / "difficulty.png").read_bytes()).decode()
    assert picture in page(output)


def test_the_report_shows_answers_to_the_same_prompts_and_the_options(finished):
    _, output = finished
    text = page(output)
    before, after = (
        [json.loads(line) for line in (output / f"answers-{when}.jsonl").read_text().splitlines()]
        for when in ("before", "after")
    )
    shown = [row for row in table_rows(text) if len(row) == 4 and row[0].startswith("Say ")]
    assert [row[1] for row in shown] == [answer["references"][0] for answer in before]
    assert [answer["line"] for answer in before] == [answer["line"] for answer in after]
    assert "batch_size: 4" in text


def test_what_models_and_data_say_is_never_markup(finished, tmp_path):
    output = shutil.copytree(finished[1], tmp_path / "copy")
    for when in ("before", "after"):
        record = {"line": 1, "prompt": "<script>alert(1)</script>", "references": ["<b>"], "answer": "&amp;"}
        write_jsonl(output / f"answers-{when}.jsonl", [record])
    text = write_report(output).read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&amp;amp;" in text


def test_a_report_of_a_run_that_has_only_measured_leaves_the_rest_out(finished, tmp_path):
    inputs, _ = finished
    output = tmp_path / "out"
    assert run("measure", output, *select(options(inputs), "measure")) == 0
    assert run("report", output) == 0
    rows = table_rows(page(output))
    assert ["ROUGE-L, 0 to 100", "-", "-"] in rows
    assert [row[0] for row in rows if row[-1].endswith("GiB")] == ["measure", "in all"]
    assert "data:image" not in page(output)
    assert "<h2>Stages</h2>" not in page(output)


def test_a_report_after_measuring_other_samples_does_not_mix_in_the_old_order(finished, copied):
    inputs, _ = finished
    few = write_jsonl(copied.parent / "few.jsonl", arithmetic(8))
    assert run("measure", copied, *select(options(inputs, train=few), "measure"), "--restart") == 0
    assert run("report", copied) == 0
    assert "<h2>Stages</h2>" not in page(copied)


def test_a_log_whose_steps_were_all_skipped_is_left_out_of_the_curves(copied):
    skipped = {"step": 17, "stage": 3, "temperature": 2.0, "alpha": 0.0, "loss": 0.0, "skipped_steps": 1}
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(skipped) + "\n")
    losses, scores = training_figure(copied).axes
    for line in losses.lines[:2]:
        assert line.get_xdata().tolist() == [1, 2, 5, 10, 15, 16]
    assert scores.lines[0].get_xdata().tolist() == [2, 5, 10, 16]
    assert scores.get_ylim()[0] == 0
    assert write_report(copied).stat().st_size > 10_000


def test_an_evaluation_without_a_number_is_no_stages_best(copied):
    path = copied / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    before = table_rows(write_report(copied).read_text())
    scored = next(r for r in records if r["stage"] == 3 and "eval_rouge_l" in r)
    for broken in ({"eval_cross_entropy": float("nan")}, {"eval_rouge_l": float("nan")}):
        first = scored | broken | {"step": 11}
        path.write_text("".join(json.dumps(one) + "\n" for one in [first, *records]))
        assert table_rows(write_report(copied).read_text()) == before


def test_a_report_without_a_run_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} holds no run"):
        write_report(tmp_path)


def test_scores_have_their_spread_and_a_dash_where_there_are_none(tmp_path):
    scores = {"rouge_l": 12.345, "rouge_l_spread": 0.5, "exact_match": 3.21, "cross_entropy": 1.5}
    (tmp_path / "evaluation.json").write_text(json.dumps({"before": scores}))
    assert result_rows(tmp_path) == [
        ScoreRow("ROUGE-L, 0 to 100", before="12.35 ± 0.50", warmed="-", after="-"),
        ScoreRow("exact match, %", before="3.2", warmed="-", after="-"),
        ScoreRow("cross-entropy, nats a token", before="1.500", warmed="-", after="-"),
    ]


def test_steps_have_times_and_memory_and_their_sum_and_peak():
    stamps = {
        "measure": {"done": True, "seconds": 50.0, "peak_bytes": 1 << 30},
        "train": {"done": True, "seconds": 140.5, "peak_bytes": 3 << 29},
        "evaluate-after": {"done": False, "seconds": 7.0, "peak_bytes": 1 << 40},
    }
    assert step_rows(stamps) == [
        StepRow("measure", time="50.0 s", memory="1.00 GiB"),
        StepRow("train", time="2 min 20 s", memory="1.50 GiB"),
        StepRow("in all", time="3 min 10 s", memory="1.50 GiB"),
    ]


def test_the_terminals_table_has_scores_times_speed_and_the_reports_place(finished):
    _, output = finished
    lines = summary_table(output).splitlines()
    results = read_json(output / "evaluation.json")
    assert lines[0].split() == ["held-out", "samples", "before", "after"]
    assert lines[3].split()[-2:] == [f"{results[when]['cross_entropy']:.3f}" for when in ("before", "after")]
    assert re.fullmatch(r"training speed: [\d,]+ tokens/s", lines[-2])
    assert lines[-1] == f"report: {output / 'report.html'}"
