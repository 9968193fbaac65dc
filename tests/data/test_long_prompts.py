"""A prompt over the limit is shortened from its beginning: what goes, and that as little goes as can."""

import random
import unicodedata

import pytest
from tiny import tiny_tokenizer, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.long_prompts import shortened
from pocl_fast.data.sample_set import read_set
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import Sample, samples_from
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError

CALL = {"function": {"name": "f", "arguments": {}}}


def turns(*said):
    """Messages out of "role: text"; "call" is an assistant's call of a tool."""
    made = []
    for one in said:
        role, _, text = one.partition(": ")
        made.append({"role": "assistant", "content": "", "tool_calls": [CALL]} if role == "call" else
                    {"role": role, "content": text})  # fmt: skip
    return made


def sample_of(*said, earlier=()):
    *before, answer = turns(*said)
    return Sample(0, 1, tuple(before), (answer["content"],), instruction=before[-1]["content"], earlier=earlier)


def letters(sample):
    """The length of a prompt in letters; a turn has 1 besides. What is behind the first answer does not count."""
    return sum(len(turn["content"]) + 1 for turn in sample.messages[: min(sample.earlier, default=None)])


def kept(sample):
    return ["call" if turn.get("tool_calls") else f"{turn['role']}: {turn['content']}" for turn in sample.messages]


TALK = ("system: S", "user: one", "assistant: 1", "user: two", "assistant: 2", "user: three", "assistant: 3")
BEFORE = ("user: early question", "assistant: 0")
AGENT = ("user: do it", "call", "tool: aaaa", "call", "tool: bbbb", "tool: cccc", "assistant: done")


@pytest.mark.parametrize(
    ("said", "limit", "expected", "dropped", "cut"),
    [
        (TALK, 20, [*TALK[:1], *TALK[3:6]], 2, False),
        (TALK, 13, [*TALK[:1], *TALK[5:6]], 4, False),
        (TALK, 8, [*TALK[:1], *TALK[5:6]], 4, False),  # as long as the limit
        (TALK, 7, ["system: S", "user: hree"], 4, True),
        (TALK, 4, ["system: S", "user: e"], 4, True),
        (AGENT, 17, [AGENT[0], *AGENT[3:6]], 2, False),
        (AGENT, 16, [AGENT[0], "call", "tool: bbb", "tool: cccc"], 2, True),
        (AGENT, 12, [AGENT[0], "call", "tool: ", "tool: ccc"], 2, True),
        (AGENT, 8, ["user: o it", "call", "tool: ", "tool: "], 2, True),
        # a greeting before the first question, two questions in a row, a system message on the way
        (("assistant: hi", *TALK[5:]), 6, ["user: three"], 1, False),
        (("user: first", "user: second", "assistant: a"), 7, ["user: second"], 1, False),
        (("user: a", "assistant: b", "system: T", "user: c", "assistant: d"), 4, ["system: T", "user: c"], 2, False),
    ],
)
def test_the_oldest_turns_go_with_all_that_belongs_to_them_and_then_the_beginning_of_a_text(
    said, limit, expected, dropped, cut
):
    short = shortened(sample_of(*said), letters, limit)
    assert kept(short.sample) == expected
    assert (short.turns, short.cut) == (dropped, cut)
    assert letters(short.sample) <= limit


@pytest.mark.parametrize(
    "said", [TALK, AGENT, ("system: SSSSSSS", "user: a", "assistant: b"), ("system: S", "assistant: b")]
)
def test_nothing_is_made_of_a_prompt_of_which_nothing_would_be_asked(said):
    least = 2 if said[0] == "system: SSSSSSS" else 1
    assert shortened(sample_of(*said), letters, least) is None


# of the first question that is trained on the most that fits; with the exchange before it, which is not trained on, or
# without
@pytest.mark.parametrize(
    ("before", "limit", "question"), [((), 12, "ven chars"), ((), 6, "ars"), (BEFORE, 12, "ven chars")]
)
def test_where_all_answers_are_trained_on_no_answer_of_them_goes(before, limit, question):
    said = ("system: S", *before, "user: eleven chars", "assistant: 1", "user: two", "assistant: 2", "user: nine char")
    place = len(before) + 2
    sample = sample_of(*said, "assistant: 3", earlier=(place, place + 2))
    short = shortened(sample, letters, limit, answer=place)
    assert kept(short.sample) == ["system: S", f"user: {question}", *said[-4:]]
    assert short.sample.earlier == (2, 4)  # places among the messages that are left
    assert letters(short.sample) <= limit


def test_the_input_of_a_record_goes_before_its_instruction():
    [sample] = samples_from([{"instruction": "say", "input": "long", "output": "b"}], "x")
    for limit, left in ((9, ("say", "ong")), (7, ("say", "g")), (4, ("say", "")), (3, ("ay", "")), (1, None)):
        short = shortened(sample, letters, limit)
        if left is None:
            assert short is None
            continue
        assert (short.sample.instruction, short.sample.input) == left
        assert short.sample.messages[-1]["content"] == "\n\n".join(filter(None, left))


# letters with accents of their own, a family of emoji, a flag, a Hangul syllable in parts, a line end of two signs
@pytest.mark.parametrize(
    "sign",
    ["e\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u1112\u1161\u11ab", "\r\n."],
)
def test_no_half_of_a_character_is_left(sign):
    sample = sample_of(f"user: {sign * 6}", "assistant: b")
    for limit in range(3, 6 * len(sign)):
        short = shortened(sample, letters, limit)
        if short is not None:
            text = short.sample.messages[0]["content"]
            assert unicodedata.category(text[0])[0] != "M"
            assert (sign * 6).endswith(text)
            assert len(text) % len(sign) in (0, 1 if sign == "\r\n." else 0)


def trained_tokenizer():
    """A byte-level tokenizer with long words, so that half a word has more tokens than a whole one."""
    random.seed(3)
    words = ["".join(random.choices("abcdefg", k=random.randint(2, 9))) for _ in range(60)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([" ".join(random.choices(words, k=30)) for _ in range(80)], trainer)
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "additional_special_tokens": ["<|start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer, words


def test_the_longest_end_that_fits_is_kept():
    tokenizer, words = trained_tokenizer()
    encoder = SampleEncoder(tokenizer)

    def length(sample):
        return len(encoder.encode_prompt(sample))

    least = length(sample_of("user: a", "assistant: b"))
    for seed in range(4):
        random.seed(seed)
        text = " ".join(random.choices(words, k=14))
        sample = sample_of(f"user: {text}", "assistant: b")
        for limit in (least, least + 3, least + 9):
            assert length(sample) > limit
            left = shortened(sample, length, limit).sample.messages[0]["content"]
            ends = (text[at:] for at in range(1, len(text)))
            assert left == next(end for end in ends if length(sample_of(f"user: {end}", "assistant: b")) <= limit)


# -- a data set --------------------------------------------------------------------------------------------------------


def records():
    talk = {"messages": turns("user: " + "old " * 9, "assistant: yes", "user: " + "new " * 3, "assistant: b")}
    return [
        {"messages": turns("user: Hi", "assistant: b")},
        talk,
        {"messages": turns("user: start " + "more " * 20 + "end <|end|>", "assistant: " + "b" * 90)},
        {**talk, "messages": [{"role": "system", "content": "Be brief."}, *talk["messages"]]},
    ]


def test_a_set_has_the_shortened_samples_beside_their_tokens_and_says_what_was_dropped(tmp_path):
    options = DataOptions(max_length=120, max_prompt_length=70, long_prompts="truncate-left")
    path, tokenizer = write_jsonl(tmp_path / "long.jsonl", records()), tiny_tokenizer()
    made, report = read_set(path, SampleEncoder(tokenizer, train_on="last"), options, "x")
    assert [len(one.prompt_ids) <= 70 for one in made.encoded] == [True] * 4
    assert len(made.encoded[2].prompt_ids) == 70
    for one in made.encoded:
        sample = made.samples[one.index]
        written = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(one.prompt_ids) == written
    assert "more end <|end|>" in made.samples[2].messages[0]["content"]
    assert [turn["content"] for turn in made.samples[3].messages] == ["Be brief.", "new new new "]
    said = report.describe("x")
    expected = (
        "3 prompts shortened to --max-prompt-length (lines 2, 3, 4): 4 turns and the beginning of 1 question dropped"
    )
    assert expected in said
    assert "1 sample has a control token in its text, <|end|> (line 3)" in said

    stream = SampleStream(source_of(path), SampleEncoder(tokenizer, train_on="last"), options)
    assert stream.check() == report
    assert [row for piece in stream for row in piece] == list(zip(made.samples, made.encoded, strict=True))


def test_the_alpaca_template_is_kept_whole():
    tokenizer = tiny_tokenizer(chat=False)
    options = DataOptions(max_length=400, max_prompt_length=300, long_prompts="truncate-left")
    record = {"instruction": "Sum up.", "input": "word " * 60, "output": "b"}
    made, _ = read_set([record], SampleEncoder(tokenizer), options, "x")
    prompt = tokenizer.decode(made.encoded[0].prompt_ids)
    assert len(made.encoded[0].prompt_ids) == 300
    assert prompt.startswith("Below is an instruction")
    assert prompt.endswith("### Response:\n")
    assert "### Instruction:\nSum up.\n\n### Input:\n" in prompt
    assert made.samples[0].input in "word " * 60


def test_a_prompt_that_no_question_fits_in_is_refused_with_its_line(tmp_path):
    options = DataOptions(max_length=120, max_prompt_length=70, long_prompts="truncate-left")
    bad = [*records(), {"messages": turns("system: " + "S" * 80, "user: Hi", "assistant: b")}]
    path = write_jsonl(tmp_path / "long.jsonl", bad)
    message = (
        r"1 of 5 prompts are over --max-prompt-length 70 tokens even with one sign left of their question \(line 5\)"
    )
    with pytest.raises(InputError, match=message):
        read_set(path, SampleEncoder(tiny_tokenizer()), options, "x")
    with pytest.raises(InputError, match=message):
        SampleStream(source_of(path), SampleEncoder(tiny_tokenizer()), options).check()
