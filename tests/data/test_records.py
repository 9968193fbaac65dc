"""Reading JSON Lines and encoding: formats, templates, limits, and what is said about bad lines."""

import json

import pytest
from tiny import tiny_tokenizer, write_jsonl

from pocl_fast.data.records import SampleEncoder, encode_all, read_samples
from pocl_fast.system.errors import InputError

LIMITS = {"max_length": 100, "max_prompt_length": 80, "long_prompts": "error", "name": "a.jsonl"}


def test_the_three_formats_give_the_same_conversation(tmp_path):
    records = [
        {"instruction": "Add.\n\n1 2", "output": "3"},
        {"instruction": "Add.", "input": "1 2", "output": ["3", "three"]},
        {"prompt": "Add.\n\n1 2", "response": "3"},
        {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    ]
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", records))
    assert all(sample.messages == ({"role": "user", "content": "Add.\n\n1 2"},) for sample in samples)
    assert [sample.references for sample in samples] == [("3",), ("3", "three"), ("3",), ("3",)]
    assert [(sample.index, sample.line) for sample in samples] == [(0, 1), (1, 2), (2, 3), (3, 4)]


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
        ('{"text": "a"}', "no known field in ['text']"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'field "messages" must be a list of at least'),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "must be the assistant's",
        ),
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
    with pytest.raises(InputError, match=r"holds no sample|not UTF-8"):
        read_samples(path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_samples(tmp_path / "nowhere.jsonl")


def _encode(tmp_path, record, tokenizer, **limits):
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", [record]))
    return encode_all(samples, SampleEncoder(tokenizer), **{**LIMITS, **limits})


def test_the_chat_template_frames_the_prompt_and_the_response_ends_with_the_end_of_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    [one], _ = _encode(tmp_path, {"prompt": "hé", "response": "yes"}, tokenizer)
    assert tokenizer.decode(one.prompt_ids) == "<|start|>user\nhé<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(one.response_ids) == "yes<|end|>"
    assert not one.truncated


def test_without_a_chat_template_the_papers_alpaca_template_is_used(tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    limits = {"max_length": 900, "max_prompt_length": 800}
    [one], _ = _encode(tmp_path, {"instruction": "Add.", "input": "1 2", "output": "3"}, tokenizer, **limits)
    text = tokenizer.decode(one.prompt_ids)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert tokenizer.decode(one.response_ids) == "3<|end|>"


def test_earlier_turns_are_prompt_and_only_the_last_answer_is_the_response(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = tiny_tokenizer()
    [one], _ = _encode(tmp_path, record, tokenizer)
    assert "b<|end|>" in tokenizer.decode(one.prompt_ids)
    assert tokenizer.decode(one.response_ids) == "d<|end|>"


def test_a_response_over_the_limit_is_cut_but_never_to_nothing_and_is_reported(tmp_path):
    tokenizer = tiny_tokenizer()
    [one], report = _encode(tmp_path, {"prompt": "a", "response": "b" * 500}, tokenizer, max_length=81)
    assert len(one) == 81
    assert one.truncated
    assert one.response_ids
    assert report.truncated == (1,)
    assert "1 responses cut to the length limit (line 1)" in report.describe("a.jsonl")


def test_a_prompt_over_the_limit_stops_the_run_or_is_skipped_when_asked(tmp_path):
    tokenizer = tiny_tokenizer()
    records = [{"prompt": "a", "response": "b"}, {"prompt": "a" * 200, "response": "b"}]
    samples = read_samples(write_jsonl(tmp_path / "a.jsonl", records))
    encoder = SampleEncoder(tokenizer)
    with pytest.raises(
        InputError, match=r"1 of 2 prompts are over --max-prompt-length 80 tokens \(line 2; the longest has"
    ):
        encode_all(samples, encoder, **LIMITS)
    encoded, report = encode_all(samples, encoder, **{**LIMITS, "long_prompts": "skip"})
    assert [one.index for one in encoded] == [0]
    assert report.skipped == (2,)


def test_no_prompt_within_the_limit_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(InputError, match="1 of 1 prompts"):
        _encode(tmp_path, {"prompt": "a" * 200, "response": "b"}, tiny_tokenizer(), long_prompts="skip")


def test_a_template_that_rewrites_the_answer_still_gives_its_tokens_and_an_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|start|>assistant\n'", "'<|start|>assistant\n<think>'")
    [one], _ = _encode(tmp_path, {"prompt": "a", "response": "b"}, tokenizer)
    assert tokenizer.decode(one.response_ids) == "b<|end|>"


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        SampleEncoder(tokenizer)


def test_jsonl_round_trip_of_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "ü → 漢", "response": "ja"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_samples(path)[0].messages[0]["content"] == "ü → 漢"
