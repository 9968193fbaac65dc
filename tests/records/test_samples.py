"""Reading JSON Lines: the formats, and what is said of bad lines."""

import json

import pytest
from tiny import write_jsonl

from pocl_fast.records.samples import read_samples
from pocl_fast.system.errors import InputError

ASKED, ANSWERED = {"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.\n\n1 2", "output": "3"},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "Add.\n\n1 2", "response": "3"},
        {"prompt": "Add.\n\n1 2", "completion": "3"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]},
        {"conversations": [ASKED, ANSWERED]},
    ],
)
def test_every_format_gives_the_same_conversation(tmp_path, record):
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", [record] * 2))
    assert all(sample.messages == (ASKED,) for sample in samples)
    assert [sample.references for sample in samples] == [("3",), ("3",)]
    assert [(sample.index, sample.line) for sample in samples] == [(0, 1), (1, 2)]


def test_an_answer_may_be_a_list_of_accepted_ones(tmp_path):
    records = [{"instruction": "Add.", "output": "3"}, {"instruction": "Add.", "output": ["3", "three"]}]
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", records))
    assert [sample.references for sample in samples] == [("3",), ("3", "three")]


def test_blank_lines_are_passed_over_and_line_numbers_stay_true(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a", "response": "b"}\n\n{"prompt": "c", "response": "d"}\n')
    assert [(sample.index, sample.line) for sample in read_samples(path)] == [(0, 2), (1, 4)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"instruction": "a"}', 'field "output" is missing'),
        ('{"output": "a"}', 'field "instruction" is missing'),
        ('{"instruction": "a", "output": "  "}', 'field "output" is empty'),
        ('{"instruction": "", "output": "a"}', 'field "instruction" is empty'),
        ('{"instruction": "a", "output": 3}', 'field "output" must be a string, got int'),
        ('{"instruction": "a", "output": []}', 'field "output" is an empty list'),
        ('{"instruction": "a", "output": ["b", ""]}', 'field "output", item 1'),
        ('{"instruction": "a", "input": 3, "output": "b"}', 'field "input" must be a string'),
        ('{"text": "a"}', "no known field in ['text']; \"text\" alone has no question and no answer"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'field "messages" has no turn of the assistant'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', 'field "messages" must be a list of at least'),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', 'expected "role" and "content"'),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_field(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        read_samples(path)
    assert f"{path}, line 2" in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_an_empty_or_binary_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"holds no sample|looks like UTF-16"):
        read_samples(path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_samples(tmp_path / "nowhere.jsonl")


def test_jsonl_round_trip_of_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "ü → 漢", "response": "ja"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_samples(path)[0].messages[0]["content"] == "ü → 漢"
