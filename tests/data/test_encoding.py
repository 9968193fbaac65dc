"""From samples to tokens: templates, length limits, and what is said of samples over these."""

import pytest
from tiny import tiny_tokenizer, write_jsonl

from pocl_fast.data.encoding import SampleEncoder, encode_all
from pocl_fast.data.records import read_samples
from pocl_fast.system.errors import InputError

LIMITS = {"max_length": 100, "max_prompt_length": 80, "long_prompts": "error", "name": "a.jsonl"}


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
    assert "1 response cut to the length limit (line 1)" in report.describe("a.jsonl")


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
