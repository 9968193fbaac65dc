"""Which samples of two sets are the same, and how that is said."""

import pytest
from tiny import tiny_tokenizer

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import SampleKeys, read_set, same_samples_lines
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import samples_from


def samples(*records):
    """Records, or prompts with their answers."""
    return samples_from([r if isinstance(r, dict) else {"prompt": r[0], "response": r[1]} for r in records], "d")


def talk(*texts):
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


TRAIN = samples(("What is 1?", "one"), ("what  is\n1?", "ONE"), ("What is 1?", "two"), ("What is 2?", "two"))


def test_copies_are_samples_of_equal_prompt_and_answer_whatever_their_blanks_and_letter_case():
    assert SampleKeys(TRAIN).copies() == 1
    assert SampleKeys(samples(("a b", "c"), ("ab", "c"), ("a", "b c"))).copies() == 0
    assert SampleKeys().copies() == 0


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (("WHAT IS 2?", "two "), (1, 0)),
        (("What is 2?", ["zwei", "Two"]), (1, 0)),  # any reference
        (("What is 2?", "three"), (0, 1)),
        (("What is 3?", "two"), (0, 0)),
        ({"prompt": "What is 2?", "response": "two", "system": "Be brief."}, (0, 0)),  # asked otherwise
        (talk("What is 2?", "two"), (1, 0)),  # another form of record
        (talk("What is 2?", "two", "Sure?", "yes"), (0, 0)),
    ],
)
def test_a_sample_is_found_with_its_answer_or_by_its_prompt_alone(record, found):
    assert SampleKeys(TRAIN).found_in(samples(record)) == found


def test_earlier_answers_of_a_conversation_are_trained_on_too():
    keys = SampleKeys(samples(talk("a", "b", "c", "d")))
    assert keys.found_in(samples(("a", "b"))) == (1, 0)
    assert keys.found_in(samples(("a", "x"))) == (0, 1)
    assert keys.found_in(samples(("c", "d"))) == (0, 0)
    assert keys.copies() == 0


def test_tool_calls_tell_answers_apart():
    def calls(name):
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        return {"messages": [*talk("q")["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]}

    keys = SampleKeys(samples(calls("f"), calls("g")))
    assert keys.copies() == 0
    assert keys.found_in(samples(calls("g"))) == (1, 0)
    assert keys.found_in(samples(calls("h"))) == (0, 1)


def test_what_is_the_same_is_said_with_counts_and_of_a_test_in_stronger_words():
    dev, test = (
        samples(("What is 2?", "two"), ("Why?", "so")),
        samples(("What is 1?", "zero"), ("why?", "So"), ("x", "y")),
    )
    lines = same_samples_lines(
        ("t.jsonl", TRAIN), [("dev set", dev), ("test set", test)], tests=["test set"], choosing="dev set"
    )
    copies, of_dev, of_test, chosen = lines
    assert copies.startswith("t.jsonl: 1 of 4 samples are copies of others (equal prompt and answer,")
    assert of_dev.startswith("dev set: 1 of 2 samples are among the training samples too: ")
    assert of_test.startswith("test set: the prompts alone of 1 of 3 samples are among the training samples too: ")
    assert of_test.endswith("so this is no test: take them out of the training samples")
    assert chosen.startswith("test set: 1 of 3 samples are in the dev set too, by whose scores the weights are chosen")


def test_sets_that_share_nothing_have_no_lines():
    assert same_samples_lines(("t", TRAIN[:1]), [("dev set", samples(("x", "y")))], choosing="dev set") == []


def test_samples_that_a_limit_left_out_are_not_counted():
    records = [{"prompt": "a", "response": "b"}, {"prompt": "long " * 50, "response": "b"}]
    limits = DataOptions(max_length=90, max_prompt_length=80, long_prompts="skip")
    data, _ = read_set([*records, *records], SampleEncoder(tiny_tokenizer()), limits, "d")
    assert [len(list(data.used())), SampleKeys(data.used()).copies()] == [2, 1]
