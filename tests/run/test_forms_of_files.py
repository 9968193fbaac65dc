"""Whole runs from files of other forms: the same bytes come out as from JSON Lines."""

import gzip
import json

import datasets
import pandas as pd
import pytest
from tiny import arithmetic
from tiny_run import make_inputs, options, refusal, run, select, weights

from pocl_fast.records import files

RECORDS = arithmetic(24)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and JSON Lines, and the same records in other forms."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    made = datasets.Dataset.from_list(RECORDS)
    made.to_parquet(folder / "train.parquet")
    pd.DataFrame(RECORDS).to_json(folder / "array.json", orient="records", indent=1)
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(folder / "saved")
    with gzip.open(folder / "train.jsonl.gz", "wt") as out:
        out.writelines(json.dumps(one) + "\n" for one in RECORDS)
    return folder


@pytest.fixture(scope="module")
def table(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("lines") / "run"
    assert run("measure", output, *select(options(inputs), "measure")) == 0
    return (output / "difficulty.parquet").read_bytes()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl.gz", "array.json", "saved:train", "saved/train"])
def test_measure_gives_the_table_of_the_json_lines(inputs, table, tmp_path, monkeypatch, name, pieces):
    if pieces:
        monkeypatch.setattr(files, "LARGE", 0)
    words = select(options(inputs, train=f"{inputs}/{name}"), "measure")
    assert run("measure", tmp_path / "run", *words) == 0
    assert (tmp_path / "run/difficulty.parquet").read_bytes() == table


def test_distill_gives_the_student_of_the_json_lines_and_goes_on_with_the_same_data_alone(inputs, tmp_path, capsys):
    assert run("distill", tmp_path / "lines", *options(inputs)) == 0
    words = options(inputs, train=inputs / "train.parquet", dev=f"{inputs}/dev.jsonl")
    assert run("distill", tmp_path / "table", *words) == 0
    assert weights(tmp_path / "table") == weights(tmp_path / "lines")
    assert run("distill", tmp_path / "table", *words) == 0  # nothing is left to do
    datasets.Dataset.from_list(RECORDS[1:]).to_parquet(tmp_path / "other.parquet")
    said = refusal(capsys, "distill", tmp_path / "table", *options(inputs, train=tmp_path / "other.parquet"))
    assert "was made with other input (train data" in said


def test_a_row_that_is_too_long_is_called_a_row(inputs, tmp_path, capsys):
    long = [*RECORDS, {"instruction": "word " * 300, "input": "", "output": "a"}]
    datasets.Dataset.from_list(long).to_parquet(tmp_path / "long.parquet")
    words = select(options(inputs, train=tmp_path / "long.parquet"), "measure")
    assert "(row 25; the longest has" in refusal(capsys, "measure", tmp_path / "run", *words)
    assert run("measure", tmp_path / "run", *words, "--long-prompts", "skip") == 0
    assert "1 skipped for a prompt over the limit (row 25)" in capsys.readouterr().out
