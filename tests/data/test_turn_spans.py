"""All answers of a conversation: where each is in the text and the tokens, against the same answer as the last one."""

from functools import cache

import pytest
from test_answer_span import SHAPES, tokenizer_of
from test_encoding import SlowTokenizer, sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.turn_spans import up_to
from pocl_fast.records.samples import Sample

WIDE = {"max_length": 9000, "max_prompt_length": 8000}
SPECIAL = ["<|eot|>", "<|return|>", "<|user|>", "<|assistant|>", "<|start|>"]
TALK = [
    ("one", "yes"),
    ("Hi", "yes"),
    ("a\n\nb", "yes\n\n"),
    ("user", "assistant"),
    ("1", " 2 "),
    ("Hi", "ok.\n"),
    ("e", "n"),
]


def conversation(pairs=TALK, system=False):
    """A sample whose answers are all trained on."""
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return sample_of(turns)


def sample_of(turns, **given):
    *before, last = turns
    earlier = tuple(i for i, turn in enumerate(before) if turn["role"] == "assistant")
    answer = last if len(last) > 2 else None
    text = last["content"] or "call"
    return Sample(0, 1, tuple(before), (text,), before[-1]["content"], answer=answer, earlier=earlier, **given)


def answers(tokenizer, sample, **options):
    """Each answer's tokens out of one pass, and each as the last one of its own conversation."""
    whole = SampleEncoder(tokenizer, **options).encode(sample, **WIDE)
    alone = SampleEncoder(tokenizer, train_on="last", **options)
    ends = [up_to(sample, place) for place in sample.earlier]
    last = [alone.encode(one, **WIDE).response_ids for one in (*ends, sample)]
    return [whole.ids[start:end] for start, end in whole.spans], last


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
    for system in (False, True):
        found, last = answers(tokenizer, conversation(system=system))
        assert len(found) == len(TALK)
        assert found[-1] == last[-1]
        for said, want in zip(found[:-1], last[:-1], strict=True):
            assert said == of_history(name, tokenizer, want), tokenizer.decode(said)


def of_history(name, tokenizer, ids):
    """A last answer as it is in the middle: without what the template writes, or the encoder puts, at the end alone."""
    text = tokenizer.decode(ids)
    block, closing = (
        "<think>\n\n</think>\n\n",
        {"gpt-oss": "<|return|>", "eos be": "\n<|end|>"}.get(name[:7], "<|end|>"),
    )
    return ids
