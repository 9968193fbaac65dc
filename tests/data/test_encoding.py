"""From samples to tokens: templates, length limits, and what is said of samples over these."""

import pytest
from template_shapes import MISTRAL, ZEPHYR, SlowTokenizer, sentencepiece
from tiny import tiny_tokenizer, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.records.samples import read_samples, samples_from
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


def test_a_template_that_leaves_the_answer_out_is_refused_with_file_and_line(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the chat template leaves every answer out, or re"):
        _encode(tmp_path, {"prompt": "a", "response": "b"}, tokenizer)


def test_a_template_that_leaves_every_answer_out_is_to_blame_and_not_the_record():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("messages %}", "messages if m['role'] == 'user' %}")
    with pytest.raises(InputError, match=r"x, record 1: the chat template leaves every answer out.*\. Take another"):
        one_of(tokenizer, {"prompt": "Hi", "response": "yes"})


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        SampleEncoder(tokenizer)


# -- prompt and answer as one text -------------------------------------------------------------------------------------


def one_of(tokenizer, record, template="auto", **options):
    limits = {"max_length": 900, "max_prompt_length": 800, "long_prompts": "error", "name": "x"}
    [one], _ = encode_all(samples_from([record], "x"), SampleEncoder(tokenizer, template, **options), **limits)
    return one


@pytest.mark.parametrize("answer", ["b", "Hi b", " b", "\nb", "b <unk> b", "é b"])
@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR], ids=["mistral", "zephyr"])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_prompt_and_response_are_the_tokens_of_the_whole_text(scheme, template, answer):
    tokenizer = sentencepiece(scheme)
    tokenizer.chat_template = template
    one = one_of(tokenizer, {"prompt": "Hi", "response": answer}, special_tokens="parse")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert list(one.prompt_ids + one.response_ids) == tokenizer(text, add_special_tokens=False).input_ids
    assert one.response_ids[-1] == tokenizer.eos_token_id
    assert answer.strip().replace("é", "<unk>") in tokenizer.decode(one.response_ids)
    assert "b" not in tokenizer.decode(one.prompt_ids).replace("<|assistant|>", "")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_the_alpaca_template_is_one_text_with_its_answer_too(scheme):
    tokenizer = sentencepiece(scheme)
    one = one_of(tokenizer, {"prompt": "Hi", "response": "b"})
    whole = tokenizer(tokenizer.decode(one.prompt_ids) + "b", add_special_tokens=False).input_ids
    assert list(one.prompt_ids + one.response_ids) == [*whole, tokenizer.eos_token_id]


def merging(*pairs):
    """A byte-level tokenizer with these merges: "\\n\\n" one token, as in many families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = ["<|pad|>", "<|start|>", "<|end|>", *("".join(pair) for pair in pairs)]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, *made])}, merges=list(pairs)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "additional_special_tokens": ["<|start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


@pytest.mark.parametrize("answer", ["b", "\nb", "\n\nb", "\n\n\nb", "XYZ", "> b"])
@pytest.mark.parametrize("added", [[], ["\nXY"]], ids=["merges", "added token"])
def test_the_prompt_is_as_asked_whatever_the_answer_begins_with(answer, added):
    tokenizer = merging(("Ċ", "Ċ"), ("Ċ", ">"))
    tokenizer.add_tokens(added)
    one = one_of(tokenizer, {"prompt": "a", "response": answer})
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    assert list(one.prompt_ids) == asked
    assert tokenizer.decode(one.response_ids) == answer + "<|end|>"
    if answer == "\n\nb":
        assert tokenizer.convert_ids_to_tokens(list(one.response_ids)) == ["ĊĊ", "b", "<|end|>"]


@pytest.mark.parametrize("closed", ["<think>\n", "<think>"])
def test_a_prompt_that_opens_reasoning_is_as_asked_for_an_answer_without_any(closed):
    tokenizer = merging(("Ċ", "Ċ"), (">", "Ċ"))
    head, foot = tokenizer.chat_template.split("assistant\n")
    tokenizer.chat_template = head + f"assistant\n{closed}" + foot
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    for answer in ("b", "\nb", "<think>\nhmm\n</think>\n\nb", "<think>\n\nhmm\n</think>\n\nb"):
        one = one_of(tokenizer, {"prompt": "a", "response": answer})
        assert list(one.prompt_ids) == asked
        assert tokenizer.decode(one.response_ids).endswith("b<|end|>")
        assert tokenizer.decode(one.response_ids).count("</think>") == 1


def test_a_blank_that_the_answers_first_token_takes_in_is_the_responses():
    tokenizer = merging(("Ġ", "b"))
    tokenizer.chat_template = tokenizer.chat_template.replace("'\n'", "' '").replace("\n", " ")
    one = one_of(tokenizer, {"prompt": "a", "response": "b"})
    assert tokenizer.decode(one.prompt_ids).endswith("<|start|>assistant")
    assert tokenizer.convert_ids_to_tokens(list(one.response_ids)) == ["Ġb", "<|end|>"]


def test_a_letter_of_the_prompt_is_no_part_of_the_answer():
    tokenizer = merging(("]", "Ġ"))
    tokenizer.chat_template = MISTRAL
    one = one_of(tokenizer, {"prompt": "a", "response": "é"})
    assert tokenizer.decode(one.prompt_ids).endswith("[/INST]")
    assert tokenizer.decode(one.response_ids) == " é<|end|>"


def test_a_special_token_that_swallows_blanks_stays_in_the_prompt():
    tokenizer = tiny_tokenizer()
    token = AddedToken("<|assistant|>", rstrip=True, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", token]})
    tokenizer.chat_template = ZEPHYR
    one = one_of(tokenizer, {"prompt": "a", "response": "  b"})
    assert tokenizer.convert_ids_to_tokens(one.prompt_ids[-1]) == "<|assistant|>"
    assert tokenizer.decode(one.response_ids) == "b<|end|>"


@pytest.mark.parametrize("answer", ["Fill <|pad|> in.", "<|start|>", "an <unk> here", "so be it <|end|>"])
@pytest.mark.parametrize("kept", ["text", "parse"])
def test_special_tokens_within_an_answer_do_not_end_it(answer, kept):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    one = one_of(tokenizer, {"prompt": "a", "response": answer}, special_tokens=kept)
    said = answer.removesuffix("<|end|>") if kept == "parse" else answer  # as text it is no end
    assert tokenizer.decode(one.response_ids) == said + "<|end|>"


def test_a_tokenizer_without_offsets_gives_the_same_parts():
    tokenizer = SlowTokenizer(eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=["<|start|>"])
    assert not tokenizer.is_fast
    tokenizer.chat_template = tiny_tokenizer().chat_template
    one = one_of(tokenizer, {"prompt": "a", "response": "yes"})
    assert tokenizer.decode(one.prompt_ids) == "<|start|>user\na<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(one.response_ids) == "yes<|end|>"


@pytest.mark.parametrize("form", ["<|start|> $A <|end|>", "$A <|end|>", "<|start|> $A", "<|start|> <|start|> $A"])
def test_the_alpaca_prompt_has_what_the_tokenizer_puts_before_a_text_and_not_what_it_puts_behind(form):
    tokenizer = tiny_tokenizer(chat=False)
    special = [("<|start|>", 257), ("<|end|>", 258)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    one = one_of(tokenizer, {"prompt": "Hi", "response": "yo"})
    before = form.count("<|start|>")
    assert one.prompt_ids[:before] == (257,) * before
    assert tokenizer.decode(one.prompt_ids[before:]).startswith("Below is")
    assert tokenizer.decode(one.prompt_ids).endswith("### Response:\n")
    assert tokenizer.decode(one.response_ids) == "yo<|end|>"
