"""All answers of a conversation: where each is in the text and the tokens, against the same answer as the last one."""

from functools import cache

import pytest
from template_shapes import (
    AGENT,
    DEEPSEEK,
    HEADER,
    QWEN3,
    SHAPES,
    TALK,
    TURNS,
    WIDE,
    SlowTokenizer,
    answers,
    conversation,
    said,
    sample_of,
    sentencepiece,
    tokenizer_of,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.templates.chat_template import ChatTemplate

SPECIAL = ["<|eot|>", "<|return|>", "<|user|>", "<|assistant|>", "<|start|>"]


@cache
def trained(kind):
    """A tokenizer of one of the families' kinds whose merges are of such conversations."""
    if kind == "slow":
        return SlowTokenizer(eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=SPECIAL)
    if kind.startswith("sentencepiece"):
        tokenizer = sentencepiece(kind.partition(" ")[2])
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        return tokenizer
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "words")
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = []
    for template, *_ in SHAPES.values():
        plain = tokenizer_of(template)
        turns = [*conversation().messages, {"role": "assistant", "content": "n"}]
        texts.append(plain.apply_chat_template(turns, tokenize=False))
    for token in (*SPECIAL, "<|end|>"):
        texts = [text.replace(token, "|") for text in texts]
    raw.train_from_iterator(
        texts * 2, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


KINDS = ["words", "across words", "sentencepiece first", "sentencepiece always", "sentencepiece never", "slow"]


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("name", SHAPES)
def test_every_answer_has_the_tokens_that_it_has_as_the_last_one(name, kind):
    tokenizer = tokenizer_of(SHAPES[name][0]) if kind == "bytes" else trained(kind)
    tokenizer.chat_template = SHAPES[name][0]
    sample = conversation(system=kind == "bytes")
    whole, usual = (SampleEncoder(tokenizer, train_on=which).encode(sample, **WIDE) for which in ("all", "last"))
    assert tokenizer.decode(whole.ids) == tokenizer.decode(usual.ids)
    found, last = answers(tokenizer, sample)
    assert len(found) == len(TALK)
    assert found[-1] == last[-1]
    for one, want in zip(found[:-1], last[:-1], strict=True):
        if name.startswith("eos behind the whole text is"):  # that end's line end may be one token with the answer's
            assert f"{tokenizer.decode(one)}\n{tokenizer.eos_token}" == tokenizer.decode(want)
        else:
            assert one == of_history(name, tokenizer, want)


def of_history(name, tokenizer, ids):
    """A last answer's tokens without what is written of last answers alone: an end, a block of reasoning."""
    if name.startswith("Qwen3"):
        block = "<think>\n\n</think>\n\n"
        first = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i], skip_special_tokens=False) == block)
        return ids[first:]
    return ids[:-1] if name in NO_END else ids


NO_END = {
    "GLM-4: no end of turn",
    "an end of turn in plain text",
    "nothing but line ends",
    "the header is always there, no end of turn",
    "gpt-oss: a last turn ends otherwise, the channel is the answer's",
}
LLAMA31 = (  # a call ends otherwise, what a tool says is written as JSON
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|start|>ipython\n\n' + (m.content | tojson) + '<|eot|>' }}"
    "{% elif m.tool_calls %}{{ '<|start|>assistant\n\n' + (m.tool_calls[0].function | tojson) + '<|return|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '\n\n' + m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("template", [QWEN3, LLAMA31], ids=["Qwen3", "Llama 3.1"])
def test_tool_calls_are_answers_like_any_other(template, kind):
    tokenizer = tokenizer_of(template) if kind == "bytes" else trained(kind)
    tokenizer.chat_template = template
    found, last = answers(tokenizer, sample_of(AGENT))
    texts = [tokenizer.decode(ids) for ids in found]
    assert len(found) == 6
    for ids, want in zip(found, last, strict=True):
        alone = tokenizer.decode(want)
        assert ids == want or alone == "<think>\n\n</think>\n\n" + tokenizer.decode(ids)
    assert [text.count('"sum"') for text in texts] == [1, 0, 1, 1, 0, 1]
    assert all(text.endswith(("<|eot|>", "<|return|>")) for text in texts)


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK], ids=["Qwen3", "DeepSeek"])
def test_an_earlier_answer_without_its_reasoning_is_not_trained_on_and_counted(template):
    tokenizer = tokenizer_of(template)
    tagged, own = "<think>\nso\n</think>\n\nyes", {"reasoning_content": "hence"} if template is QWEN3 else {}
    turns = [said("user", "a"), said("assistant", tagged), said("user", "b"), said("assistant", "no", **own)]
    turns += [said("user", "c"), said("assistant", "plain"), said("user", "d"), said("assistant", tagged)]
    encoder = SampleEncoder(tokenizer)
    one = encoder.encode(sample_of(turns), **WIDE)
    texts = [tokenizer.decode(one.ids[start:end]) for start, end in one.spans]
    end, last = tokenizer.decode(one.response_ids[-1:]), tokenizer.decode(one.response_ids)
    assert texts == ([f"plain{end}", last] if template is QWEN3 else [f"no{end}", f"plain{end}", last])
    assert "so\n</think>\n\nyes" in last
    [(what, count, lines)] = encoder.choice.take_notes()
    assert what.advice == "--reasoning strip trains on them without it"
    assert (count, lines) == (2 if template is QWEN3 else 1, (1,))


@pytest.mark.parametrize("thinks", [True, False])
def test_an_empty_block_of_reasoning_at_the_last_turn_leaves_the_earlier_ones_in(thinks):
    tokenizer = tokenizer_of(QWEN3)
    encoder = SampleEncoder(tokenizer, chat=ChatTemplate.chosen(tokenizer, kwargs={"enable_thinking": thinks}))
    one = encoder.encode(conversation(), **WIDE)
    texts = [tokenizer.decode(one.ids[start:end]) for start, end in one.spans]
    block = "<think>\n\n</think>\n\n" if thinks else ""
    assert texts == [f"{answer}<|eot|>" for _, answer in TALK[:-1]] + [f"{block}n<|eot|>"]


def test_a_template_that_writes_earlier_reasoning_has_it_trained_on():
    keeping = TURNS.replace("m['content'] + '<", "(m['reasoning_content'] or '') + '|' + m['content'] + '<")
    tokenizer = tokenizer_of(keeping + HEADER)
    turns = [
        said("user", "a"),
        said("assistant", "yes", reasoning_content="so"),
        said("user", "b"),
        said("assistant", "n"),
    ]
    one = SampleEncoder(tokenizer).encode(sample_of(turns), **WIDE)
    assert [tokenizer.decode(one.ids[a:b]) for a, b in one.spans] == ["so|yes<|eot|>", "|n<|eot|>"]


def test_all_earlier_answers_cost_one_more_rendering_and_from_the_third_conversation_on_none(monkeypatch):
    tokenizer = tokenizer_of(TURNS + HEADER)
    renders, render = [], ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **b: renders.append(1) or render(*a, **b))

    def cost(encoder, sample):
        renders.clear()
        encoder.encode(sample, **WIDE)
        return len(renders)

    every, last = SampleEncoder(tokenizer), SampleEncoder(tokenizer, train_on="last")
    first, second, third = (
        conversation([(f"question {i} of {name}", f"answer {i} {name}") for i in range(8)]) for name in "abc"
    )
    for encoder in (every, last):
        cost(encoder, conversation())  # learns what is around answers
    assert cost(every, first) == cost(last, first) + 1
    for encoder in (every, last):
        cost(encoder, second)  # learns what is written of these roles
        assert cost(encoder, third) == 0


def test_a_turn_that_the_template_rewrites_is_not_trained_on_and_counted():
    changed = TURNS.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper | reverse)")
    encoder = SampleEncoder(tokenizer_of(changed + HEADER))
    one = encoder.encode(conversation([("a", "one"), ("a question", "two")]), **WIDE)
    assert len(one.spans) == 1
    [(what, count, lines)] = encoder.choice.take_notes()
    assert what.answers.startswith("earlier answers not trained on, because it is not clear where")
    assert (count, lines) == (1, (1,))


def test_answers_are_found_though_the_template_rewrites_the_words_that_are_looked_for_in_their_place():
    changed = TURNS.replace("m['content']", "m['content'] | replace('a', 'b')")
    tokenizer = tokenizer_of(changed + HEADER)
    one = SampleEncoder(tokenizer).encode(conversation([("e", "yes"), ("f", "no")]), **WIDE)
    assert [tokenizer.decode(one.ids[start:end]) for start, end in one.spans] == ["yes<|eot|>", "no<|eot|>"]


def test_a_greeting_that_answers_nothing_is_not_trained_on_and_counted():
    tokenizer = tokenizer_of(TURNS + HEADER)
    greeting = [said("assistant", "Hello"), said("user", "a"), said("assistant", "b"), said("user", "c")]
    encoder = SampleEncoder(tokenizer)
    one = encoder.encode(sample_of([*greeting, said("assistant", "d")]), **WIDE)
    assert [tokenizer.decode(one.ids[start:end]) for start, end in one.spans] == ["b<|eot|>", "d<|eot|>"]
    [(what, count, _)] = encoder.choice.take_notes()
    assert (what.answers, count) == (
        "earlier answers not trained on, because nothing is asked before them",
        1,
    )


def test_train_on_last_supervises_the_last_answer_alone():
    tokenizer = tokenizer_of(TURNS + HEADER)
    every, last = (SampleEncoder(tokenizer, train_on=which).encode(conversation(), **WIDE) for which in ("all", "last"))
    assert (every.ids, every.prompt_ids) == (last.ids, last.prompt_ids)
    assert last.supervised == ()
    assert every.spans[-1] == last.spans[0]
    assert every.fingerprint != last.fingerprint
