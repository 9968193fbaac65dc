"""`pocl-fast compare` prints and writes a comparison, and what it cannot compare is one message."""

import json
import subprocess
import sys

import pytest
from tiny_compared import make_run

from pocl_fast.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ours = [make_run(folder / f"ours{seed}", seed=seed, better=3) for seed in (1, 2)]
    return [str(path) for path in [*ours, make_run(folder / "flat", curriculum="none")]]


def said(capsys, *words):
    capsys.readouterr()
    assert main(["compare", *words]) == 0
    return capsys.readouterr().out


def refusal(capsys, *words):
    capsys.readouterr()
    assert main(["compare", *words]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_tables_are_printed(runs, capsys):
    text = said(capsys, *runs)
    assert ["A", "curriculum", "pocl", "1", "2", "20", "1.0"] in [line.split() for line in text.splitlines()]
    assert "ROUGE-L of sampled answers (0 to 100; higher is better)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_names_are_taken(runs, capsys):
    text = said(capsys, *runs, "--names", "ours", "without a curriculum")
    assert "  B  without a curriculum " in text


@pytest.mark.parametrize(("form", "begins"), [("markdown", "### Methods\n\n|  | method |"), ("latex", "% needs \\use")])
def test_a_format_is_printed(runs, capsys, form, begins):
    assert said(capsys, *runs, "--format", form).startswith(begins)


def test_json_has_every_figure(runs, capsys):
    found = json.loads(said(capsys, *runs, "--json"))
    assert [method["label"] for method in found["methods"]] == ["A", "B"]
    assert [run["seed"] for run in found["methods"][0]["runs"]] == [1, 2]
    [dev] = found["sets"]
    assert set(dev["scores"]) == {"rouge_l", "exact_match", "cross_entropy", "mean_kl"}
    assert set(dev["pairs"]["rouge_l"][0]) == {"first", "second", "difference", "low", "high", "p", "adjusted_p"}
    assert found["notes"]


def test_a_folder_gets_every_form(runs, capsys, tmp_path):
    text = said(capsys, *runs, "--output", str(tmp_path / "deep/comparison"))
    folder = tmp_path / "deep/comparison"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"comparison.{e}" for e in ("html", "json", "md", "tex", "txt")
    ]
    assert text == (folder / "comparison.txt").read_text() + f"page: {folder / 'comparison.html'}\n"
    assert (folder / "comparison.html").read_text().startswith("<!doctype html>")
    assert (folder / "comparison.md").read_text() == said(capsys, *runs, "--format", "markdown")
    assert (folder / "comparison.tex").read_text() == said(capsys, *runs, "--format", "latex")
    assert (folder / "comparison.json").read_text() == said(capsys, *runs, "--json")


def test_json_alone_is_on_stdout_where_files_are_written_too(runs, capsys, tmp_path):
    assert json.loads(said(capsys, *runs, "--json", "--output", str(tmp_path)))["sets"]


def test_neither_torch_nor_transformers_is_loaded(runs, tmp_path):
    code = (
        "import sys; from pocl_fast.cli import main;"
        f" status = main(['compare', *{runs!r}, '--output', {str(tmp_path)!r}]);"
        " sys.exit(status or len({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_cannot_be_compared_is_one_message(runs, capsys, tmp_path):
    assert "give two or more run directories to compare\n" in refusal(capsys)
    assert "give two or more run directories to compare, got" in refusal(capsys, runs[0])
    assert f"{runs[0]} is given twice" in refusal(capsys, runs[0], runs[0])
    assert f"{tmp_path} holds no run" in refusal(capsys, runs[0], str(tmp_path))
    assert "1 name for 2 methods of 3 runs" in refusal(capsys, *runs, "--names", "one")
    (tmp_path / "file").write_text("")
    assert f"--output {tmp_path / 'file'} is a file" in refusal(capsys, *runs, "--output", str(tmp_path / "file"))
    assert "cannot write to --output" in refusal(capsys, *runs, "--output", str(tmp_path / "file/below"))


def test_nothing_is_written_where_nothing_is_compared(runs, capsys, tmp_path):
    refusal(capsys, runs[0], "--output", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
