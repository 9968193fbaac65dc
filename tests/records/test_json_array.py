"""Files that hold one JSON array: read a piece at a time, and what is said of one that is none."""

import json

import pytest

from pocl_fast.records import json_array
from pocl_fast.records.samples import iter_samples, read_samples
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError

ONE, TWO = {"prompt": "a", "response": "é\n\"[{'"}, {"prompt": "c \\ud83d\\ude00 😀", "response": ["d", "e"]}


def refused(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read_samples(path)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


# 1: every place of the text is a border of two pieces once; 7: such borders at other places; 1000: one piece
@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(
    "written", [{}, {"indent": 1}, {"ensure_ascii": False, "indent": 2}, {"separators": (",", ":")}]
)
def test_an_array_is_read_as_the_json_library_reads_it(tmp_path, monkeypatch, piece, written):
    monkeypatch.setattr(json_array, "PIECE", piece)
    content = "\ufeff \n" + json.dumps([ONE, TWO] * 3, **written) + "\n \n"
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    source = source_of(tmp_path / "a.json")
    assert [record for _, record in source.records("")] == [ONE, TWO] * 3
    assert [sample.place for sample in iter_samples(source)] == [f"record {i}" for i in range(1, 7)]


def test_an_array_is_not_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "PIECE", 1000)
    (tmp_path / "a.json").write_text(json.dumps([ONE] * 1000))
    with open(tmp_path / "a.json", encoding="utf-8") as file:
        array = json_array.Objects(tmp_path / "a.json", file, "")
        held = [len(array._text) for _ in array]
    assert len(held) == 1000
    assert max(held) < 2100


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"prompt": "a", "response": "b"},\n\n 3]', ", line 3: expected a JSON object, got int"),
        ('[{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b"}]', ", line 2: expected , or ]"),
        ('[{"prompt": "a", "response": "b"},\n]', ", line 2: the array ends with a comma"),
        ('[\n{"prompt": "a", "response": tru},\n{}]', ", line 2: not JSON"),
        ('[\n{"prompt": "a",\n "prompt": "b"}]', ', line 2: the field "prompt" is named twice'),
        ('[{"prompt": "a", "response": "b"}]\n{"prompt": "a"}', ", line 2: something follows the array"),
        ('[{"prompt": "a", "response": "b"}]\n[]', ", line 2: something follows the array"),
        ('[{"prompt": "a", "response": "b"},\n{"prompt": "a",', ", line 2: the file ends before the array does"),
        ('[{"prompt": "a", "response": "b"},\n{"prompt": "a}]', ", line 2: the file ends before the array does"),
        ('[{"prompt": "a", "response": "b"}\n', ", line 2: the file ends before the array does"),
        ("[", ", line 1: the file ends before the array does"),
        ("[" * 100_000, ", line 1: lists or objects are nested too deeply"),
        ("[]", " holds no sample"),
        ('[{"prompt": "a", "response": "b"},\n{"prompt": "", "response": "b"}]', ", record 2 (line 2): field "),
        (b'[{"prompt": "a", "response": "b"},\n{"prompt": "\xe9"}]', ", line 2, is not UTF-8 text"),
    ],
)
def test_what_is_no_array_of_objects_is_named_with_its_line(tmp_path, content, says):
    assert refused(tmp_path / "a.json", content).startswith(says)


def test_an_array_behind_lines_is_named_with_its_line(tmp_path):
    said = refused(tmp_path / "a.json", '{"prompt": "a", "response": "b"}\n[{"prompt": "a", "response": "b"}]')
    assert said.startswith(", line 2: expected a JSON object, got list")
    assert "jq -c" in said
