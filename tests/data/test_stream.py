"""A file of samples read a piece at a time gives what it gives read at once, in the memory of a piece."""

import tracemalloc

import pyarrow.parquet as pq
import pytest
from tiny import arithmetic, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal, run, select

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import read_samples
from pocl_fast.records.sources import source_of
from pocl_fast.run import context as run_module
from pocl_fast.system import resumable_table
from pocl_fast.system.errors import InputError

LIMITS = {"max_length": 96, "max_prompt_length": 80}


def stream(path, long_prompts="skip", **limits):
    chosen = DataOptions(**(LIMITS | limits), long_prompts=long_prompts)
    return SampleStream(source_of(path), SampleEncoder(tiny_tokenizer()), chosen)


def uneven(folder, count=20):
    """Samples of which one does not fit, and one is cut."""
    records = arithmetic(count)
    records[3]["instruction"] = "long " * 30
    records[5]["output"] = "b" * 200
    return write_jsonl(folder / "samples.jsonl", records)


# pieces of one; which end behind a sample that is left out; of all but one, of all, of more than all that fit
@pytest.mark.parametrize("piece", [1, 4, 18, 19, 100])
def test_pieces_hold_the_samples_that_fit_in_order(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(resumable_table, "PIECE", piece)
    path = uneven(tmp_path)
    samples = read_samples(path)
    encoded, report = encode_all(
        samples, SampleEncoder(tiny_tokenizer()), **LIMITS, long_prompts="skip", name=str(path)
    )
    pieces = list(stream(path))
    assert [row for rows in pieces for row in rows] == [(samples[one.index], one) for one in encoded]
    assert [len(rows) for rows in pieces] == [len(rows) for rows in resumable_table.pieces_of(encoded)]
    assert stream(path).check() == report
    assert report.skipped == (4,)
    assert report.truncated == (6,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"long_prompts": "error"},
            r"1 of 20 prompts are over --max-prompt-length 80 tokens \(line 4; the longest has ",
        ),
        ({"max_prompt_length": 3}, "20 of 20 prompts are over"),
        ({"max_prompt_length": 96}, "must be at least 1 and below --max-length"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_used(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        stream(uneven(tmp_path), **change).check()


def test_bad_lines_are_named_as_when_the_file_is_read_at_once(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [*arithmetic(3), {"prompt": "a"}])
    with pytest.raises(InputError, match=r'bad\.jsonl, line 4: field "response" is missing'):
        stream(path).check()
    with pytest.raises(InputError, match="holds no sample"):
        stream(write_jsonl(tmp_path / "empty.jsonl", [])).check()


def test_memory_is_that_of_a_piece(tmp_path, monkeypatch):
    records = arithmetic(2000)
    for record in records:  # Python keeps the memory of tuples under 20 items for others of their length
        record["output"] = "b" * 30
    path, one = write_jsonl(tmp_path / "many.jsonl", records), stream(tmp_path / "many.jsonl")
    monkeypatch.setattr(resumable_table, "PIECE", 40)
    assert path.exists()

    def peak(read):
        tracemalloc.start()
        read()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert sum(len(rows) for rows in one) == 2000  # what is loaded once is
    whole = peak(lambda: list(one))
    assert peak(lambda: [len(rows) for rows in one]) < whole / 8
    assert peak(one.check) < whole / 8


def test_a_large_file_is_measured_out_of_the_stream_to_the_same_tables(tmp_path, monkeypatch, capsys):
    inputs = make_inputs(tmp_path / "inputs")
    words = (*select(options(inputs), "measure"), "--signals", "mean_kl")
    monkeypatch.setattr(resumable_table, "PIECE", 10)
    assert run("measure", tmp_path / "whole", *words) == 0
    monkeypatch.setattr("pocl_fast.records.files.LARGE", 0)
    monkeypatch.setattr(run_module, "read_set", lambda *_: pytest.fail("the file was read at once"))
    capsys.readouterr()
    assert run("measure", tmp_path / "streamed", *words) == 0
    assert f"{inputs / 'train.jsonl'}: 24 samples" in capsys.readouterr().out
    for name in ("difficulty.parquet", "teacher_scores.parquet"):
        assert pq.read_table(tmp_path / "streamed" / name).num_rows == 24
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    said = refusal(capsys, "measure", tmp_path / "new", *words, "--max-prompt-length", "20")
    assert "24 of 24 prompts are over --max-prompt-length 20 tokens" in said
