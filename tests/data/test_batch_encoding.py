"""Samples tokenised many at a time have the tokens that each has alone; plain conversations have transformers' text."""

import os
import random
import signal
import threading
import time
import tracemalloc

import pytest
from template_shapes import MISTRAL, SHAPES, ZEPHYR, sentencepiece
from tiny import CHAT_TEMPLATE, arithmetic, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.byte_tokens import ByteTokens
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.token_border import TokenBorder
from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError
from pocl_fast.templates.chat_template import ChatTemplate

LIMITS = {"max_length": 900, "max_prompt_length": 800}


def byte_level(*, trim=False, normalizer=None, added=()):
    """Bytes and some merges, of which one crosses a line end and what follows it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "b"), ("H", "i"), ("Ġ", "Ġ"), ("Ċ", "b"), ("Ã", "©"), ("Ċ", "Ċ"), ("ĠĠ", "b")]
    words = [*alphabet, *("".join(pair) for pair in merges), "</s>"]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.normalizer = normalizer
    if trim:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.add_tokens(list(added))
    return tokenizer


SWALLOWING = (AddedToken("<a>", rstrip=True, special=True), AddedToken("<b>", lstrip=True))
TOKENIZERS = {
    "bytes": byte_level,
    "offsets without blanks": lambda: byte_level(trim=True),
    "normalised": lambda: byte_level(normalizer=normalizers.NFC()),
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "tokens with blanks": lambda: byte_level(added=SWALLOWING),
    "SentencePiece, first": lambda: sentencepiece("first"),
    "SentencePiece, always": lambda: sentencepiece("always"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_cut_together_have_the_tokens_of_each_alone(kind):
    rng = random.Random(0)
    pieces = ["b", "Hi", " ", "  ", "\n", "é", "e\u0301", "😀", "</s>", "<a>", "<b>", "x", "\t", "Ġ", "\u2581"]
    texts = [
        ("".join(rng.choices(pieces, k=rng.randrange(7))), "".join(rng.choices(pieces, k=rng.randrange(7))))
        for _ in range(3000)
    ]
    texts += [(prompt + "b", answer) for prompt, answer in texts]  # most of these end with no blank
    border = TokenBorder(TOKENIZERS[kind](), special=())
    for start in range(0, len(texts), 500):
        some = texts[start : start + 500]
        assert border.turns_of(some) == [list(border.parts(prompt, answer)) for prompt, answer in some]


def test_tokens_that_are_bytes_are_cut_without_their_places_in_the_text():
    texts = [("<s>user\nHi é😀\n", "Hi b"), ("b", " b"), ("", "b"), ("Hi\n", "")]
    assert None not in ByteTokens.of(byte_level()).turns_of(texts)
    others = [("Hi\n", "b"), ("b ", "b"), ("b\n\n", "b")]  # in one token; whose the blank is; blanks by what follows
    assert ByteTokens.of(byte_level()).turns_of([*texts, *others])[len(texts) :] == [None, None, None]
    assert ByteTokens.of(sentencepiece("first")) is None


@pytest.mark.parametrize("batch", [1, 3, 7, 100])  # alone, an odd rest, one short of all, more than all
@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR, None], ids=["mistral", "zephyr", "alpaca"])
@pytest.mark.parametrize("kind", ["bytes", "SentencePiece, first"])
def test_samples_encoded_together_are_those_encoded_one_by_one(kind, template, batch):
    def encoder():
        tokenizer = TOKENIZERS[kind]()
        tokenizer.chat_template = template
        return SampleEncoder(tokenizer)

    records = [
        {"prompt": "Hi" * (1 + i % 3), "response": answer} for i, answer in enumerate(["b", " b", "\nb", "é"] * 2)
    ]
    records[5]["prompt"] = "b" * 900
    samples = samples_from(records, "x")
    one, many = encoder(), encoder()
    alone = [one.encode(sample, **LIMITS) for sample in samples]
    assert alone[5] is None
    together = list(many.fit_each(samples, pytest.fail, **LIMITS, batch=batch))
    assert [(sample, one.encoded) for sample, one in together] == list(zip(samples, alone, strict=True))
    assert (many.end_id, many.end_ids) == (one.end_id, one.end_ids)


def test_samples_are_taken_one_batch_ahead_of_those_that_are_used():
    taken = []

    def samples():
        for sample in samples_from(arithmetic(7), "x"):
            taken.append(sample.index)
            yield sample

    each = SampleEncoder(tiny_tokenizer()).fit_each(samples(), pytest.fail, **LIMITS, batch=2)
    ahead = [(next(each)[0].index, len(taken)) for _ in range(7)]
    assert ahead == [(0, 4), (1, 4), (2, 6), (3, 6), (4, 7), (5, 7), (6, 7)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_an_error_of_reading_is_said_after_all_of_the_samples_before_it(count):
    def samples():
        yield from samples_from(arithmetic(count), "x")
        raise InputError("the file ends early")

    said = []
    each = SampleEncoder(tiny_tokenizer()).fit_each(samples(), pytest.fail, **LIMITS, batch=2)
    with pytest.raises(InputError, match="the file ends early"):
        said.extend(sample.index for sample, _ in each)
    assert said == list(range(count))

    refusing = tiny_tokenizer()
    refusing.chat_template = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    each = SampleEncoder(refusing).fit_each(samples(), lambda error, line: said.append(line), **LIMITS, batch=2)
    said.clear()
    with pytest.raises(InputError, match="the file ends early"):
        list(each)
    assert said == list(range(1, count + 1))


def test_while_a_sample_is_used_no_other_thread_is_left():
    before, running = threading.active_count(), []

    def samples():
        for sample in samples_from(arithmetic(9), "x"):
            running.append(threading.active_count() - before)
            yield sample

    for _ in SampleEncoder(tiny_tokenizer()).fit_each(samples(), pytest.fail, **LIMITS, batch=2):
        assert threading.active_count() == before
    assert running[:2] == [0, 0]
    assert set(running[2:]) == {1}


def test_a_process_that_is_forked_on_the_way_reads_on():
    """As a DataLoader's worker does with an iterator that it is given; a thread does not live on in it."""
    each = SampleEncoder(tiny_tokenizer()).fit_each(samples_from(arithmetic(9), "x"), pytest.fail, **LIMITS, batch=2)
    assert next(each)[0].index == 0
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # ends one that waits for ever
        read = []
        try:
            read += each
        finally:
            os._exit(len(read))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8 == len(list(each))


def test_a_tokenizer_that_writes_texts_itself_is_used_by_one_thread_at_a_time():
    """Its own code may tokenise what it writes, and need not bear two callers."""
    busy, calls = threading.Lock(), []

    class Own(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            calls.append(busy.acquire(blocking=False))
            time.sleep(0.005)
            if calls[-1]:
                busy.release()
            return super().__call__(*args, **kwargs)

        def apply_chat_template(self, *args, **kwargs):
            self("a")
            return super().apply_chat_template(*args, **kwargs)

    tokenizer = Own(tokenizer_object=tiny_tokenizer()._tokenizer, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    samples = samples_from(arithmetic(6), "x")
    made = list(SampleEncoder(tokenizer).fit_each(samples, pytest.fail, **LIMITS, batch=2))
    assert [sample for sample, _ in made] == samples
    assert len(calls) > 6
    assert all(calls)


def test_kept_tokens_take_8_bytes_each():
    samples = samples_from([{"prompt": "a" * 300, "response": "é" * 300}] * 100, "x")
    encoder = SampleEncoder(tiny_tokenizer())
    limits = {"max_length": 2000, "max_prompt_length": 1000, "long_prompts": "error", "name": "x"}
    encode_all(samples, encoder, **limits)
    tracemalloc.start()
    kept, _ = encode_all(samples, encoder, **limits)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 < size / sum(map(len, kept)) < 9


# -- texts -------------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": " Hi é "}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}] * 2
BRANCHING = (
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% if m.role == 'user' and 'é' in m.content %}é{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ loop.first }} {{ m['content'].split('</think>')[-1] | trim }} {{ ns.n }}"
    "{{ tools is none }}{{ documents is defined }}{{ enable | default('none') }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}asked{% endif %}{{ {'b': 1, 'a': [true]} | tojson }}"
)
TEMPLATES = {"chat": CHAT_TEMPLATE, "branching": BRANCHING, **{name: shape[0] for name, shape in SHAPES.items()}}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"enable": False}, {"enable": {"deep": [1]}}], ids=str)
@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_conversations_have_the_text_that_transformers_writes(name, kwargs, prompt):
    tokenizer = tiny_tokenizer()
    chat = ChatTemplate(tokenizer, {"default": TEMPLATES[name]}, kwargs)
    for turns in (TURNS[:1], TURNS[:3], TURNS, [{**TURNS[0], "name": "x"}]):  # the first decides how it is written
        theirs = tokenizer.apply_chat_template(
            turns, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt, **kwargs
        )
        assert chat.render(turns, prompt=prompt) == theirs


def test_a_tokenizer_that_renders_in_its_own_way_is_asked():
    class Loud(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):
            return super().apply_chat_template(*args, **kwargs).upper()

    tokenizer = Loud(tokenizer_object=tiny_tokenizer()._tokenizer, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = ChatTemplate.chosen(tokenizer)
    for _ in range(2):
        assert chat.render(TURNS[:1], prompt=False) == "<|START|>USER\n HI É <|END|>\n"


def test_where_transformers_gives_a_template_more_it_is_asked(monkeypatch):
    tokenizer = tiny_tokenizer()
    real = type(tokenizer).apply_chat_template
    chat = ChatTemplate.chosen(tokenizer)
    monkeypatch.setattr(
        "transformers.tokenization_utils_base.render_jinja_template",
        lambda *_, conversations, **__: (["more" for _ in conversations], [[] for _ in conversations]),
    )
    assert real(tokenizer, TURNS, tokenize=False) == "more"
    assert [chat.render(TURNS, prompt=False) for _ in range(2)] == ["more", "more"]
