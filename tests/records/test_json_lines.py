"""Files of JSON Lines: the ways in which bytes become objects, and what is said where they do not."""

import gzip
import json
import os
import threading

import pytest
from tiny import tiny_tokenizer

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import read_samples
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError

ONE, TWO = '{"prompt": "a", "response": "é"}', '{"prompt": "c", "response": "d"}'


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(sample.line, sample.references[0]) for sample in read_samples(path)]


def refused(path, content):
    with pytest.raises(InputError) as error:
        read(path, content)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize(
    "content",
    [
        f"{ONE}\n{TWO}\n",
        f"{ONE}\n{TWO}",
        f"{ONE}\r\n{TWO}\r\n",
        f"{ONE}\r{TWO}\r",  # as Mac OS wrote lines before X
        f"\ufeff{ONE}\n{TWO}\n",  # as Excel and PowerShell begin a file
        f"{ONE}\r\n\ufeff{TWO}\r\n",  # such files behind each other
        f"  {ONE}\t\n {TWO}\n\ufeff\n \n",
    ],
)
def test_bom_and_line_ends_are_no_part_of_a_line(tmp_path, content):
    assert read(tmp_path / "a.jsonl", content) == [(1, "é"), (2, "d")]


def test_line_separators_within_a_text_do_not_end_a_line(tmp_path):
    text = "x\u2028y\x85z\x0cw"
    content = json.dumps({"prompt": "a", "response": text}, ensure_ascii=False)
    assert read(tmp_path / "a.jsonl", content + "\n" + TWO) == [(1, text), (2, "d")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "response": "b", "id": ' + "9" * 5000 + "}", "a number has more digits than Python reads"),
        ('{"prompt": "a", "response": "b", "id": -1' + "0" * 4400 + "}", "a number has more digits than Python reads"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "prompt": "b", "response": "c"}', 'the field "prompt" is named twice'),
        ('{"prompt": "a", "response": "c", "meta": {"x": 1, "y": 2, "x": 1}}', 'the field "x" is named twice'),
        ('{"prompt": "a \\ud83d", "response": "c"}', 'field "prompt" has half of a surrogate pair (\\ud83d)'),
        ('{"prompt": "a", "response": ["c", "\\uDE00\\uD83D"]}', 'field "response", item 1 has half of a surrogate'),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', '"content" has half of a surrogate pair'),
        ('{"prompt": "a", "response": "c", "system": "\\udc00"}', 'field "system" has half of a surrogate pair'),
        ('{"prompt": "a", "response": "c", "tools": ' + "[" * 800 + "]" * 800 + "}", "nested too deeply"),
        ('{"prompt": "a", "response": "c", "tools": [{"name": "\\udc00"}]}', 'field "tools", item 0 has half of'),
        (ONE + TWO, "something follows the object"),
        (ONE + ",", "something follows the object"),
        ("{'prompt': 'a'}", "not JSON"),
        ("\x00\x00\x00", "it has NUL bytes"),
        ('"a text"', "expected a JSON object, got str"),
        ('{"prompt": "a", "resp', "the object does not end on its line"),
        ('{"prompt": "a",', "the object does not end on its line"),
    ],
)
def test_a_line_that_python_cannot_use_is_named_with_its_number(tmp_path, line, says):
    said = refused(tmp_path / "a.jsonl", f"\n{ONE}\r\n{line}\n{TWO}\n")
    assert said.startswith(", line 3")
    assert says in said


def test_both_halves_of_a_surrogate_pair_are_a_character(tmp_path):
    assert read(tmp_path / "a.jsonl", r'{"prompt": "a", "response": "\ud83d\ude00"}') == [(1, "😀")]


def test_pretty_printed_json_is_called_so(tmp_path):
    said = refused(tmp_path / "a.json", json.dumps(json.loads(ONE), indent=2))
    assert said.startswith(", line 1: ")
    assert "pretty-printed JSON, which `jq -c . FILE` writes an object a line" in said


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04" + bytes(50), "zip"),
        (b"SQLite format 3\x00" + bytes(50), "an SQLite database"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG image"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (gzip.compress(b"a.jsonl" + bytes(250) + b"ustar" + bytes(250), mtime=0), "tar"),
        (ONE.encode("utf-16"), "UTF-16"),
        (ONE.encode("utf-16-be"), "UTF-16"),
        (ONE.encode("utf-16-le"), "UTF-16"),
        (ONE.encode("utf-32"), "UTF-32"),
        (ONE.encode("utf-32-be"), "UTF-32"),
        (ONE.encode("utf-32-le"), "UTF-32"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_is_called_by_it(tmp_path, content, kind):
    said = refused(tmp_path / "a.jsonl", content)
    assert said.startswith(" holds no records")
    assert "it looks like " in said
    assert kind in said


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_that_is_not_utf_8_is_named(tmp_path, end):
    lines = [ONE.encode()] * 999 + ['{"prompt": "a", "response": "é"}'.encode("latin-1"), ONE.encode()]
    assert refused(tmp_path / "a.jsonl", end.encode().join(lines)).startswith(", line 1000, is not UTF-8 text")


def test_a_folder_is_called_so(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without \*\.jsonl"):
        read_samples(tmp_path)


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text(f"{ONE}\n{TWO}\n"))
    writer.start()
    assert [sample.line for sample in read_samples(path)] == [1, 2]
    writer.join()


def test_a_file_that_is_cut_off_is_called_so(tmp_path):
    for length in range(len(ONE) - 1, 20, -7):
        said = refused(tmp_path / "a.jsonl", f"{TWO}\n{ONE[:length]}")
        assert said.startswith(", line 2: not JSON")
        assert ONE[length - 1] in ":," or "The file is cut off there" in said


def test_a_stream_says_the_same_of_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{ONE}\n{{"prompt": "a", "prompt": "b"}}\n')
    with pytest.raises(InputError, match='line 2: the field "prompt" is named twice'):
        SampleStream(
            source_of(path), SampleEncoder(tiny_tokenizer()), DataOptions(max_length=96, max_prompt_length=80)
        ).check()
