"""Conversations whose text is assembled from what others of their shape have shown, not rendered."""

import random
from datetime import datetime
from pathlib import Path

import pytest
import trl
from template_shapes import HEADER, SHAPES, TURNS, conversation, sample_of, tokenizer_of

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.templates.chat_template import ChatTemplate
from pocl_fast.templates.known_shapes import KnownShapes

WIDE = {"max_length": 90_000, "max_prompt_length": 80_000}
PUBLISHED = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
DAY = datetime(2026, 1, 2)
ROLES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user", "assistant"),
)
PIECES = (
    "a", "yes", "two words", "A sentence, and more. ", "\n", "\n\n", " ", "<think>", "</think>",
    "<think>\nso\n</think>\n\n", "%s", "{{ x }}", "{0}", "<tool_response>", "[INST]", "<|im_end|>", "<end_of_turn>",
    "assistant", "/no_think", "ß é 汉", "<|channel|>final<|message|>",
    "<channel|>", "\\n", '"', "<b>", "Qz7answer7zQ", "Qz7n0nzQ", "\t", "",
)  # fmt: skip


def tokenizer_with(name):
    """A tokenizer with one of the templates, and with all tokens that they write."""
    tokenizer = tokenizer_of(SHAPES[name][0] if name in SHAPES else PUBLISHED[name].read_text())
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.pad_token
    return tokenizer


def drawn(generator, roles, plain=False):
    """A conversation of these roles; of plain words, or of what templates and finders look for."""
    turns = []
    for role in roles:
        pieces = generator.choices(PIECES[:4] if plain else PIECES, k=generator.randint(1, 4))
        turns.append({"role": role, "content": "".join(pieces).strip() if plain else "".join(pieces) or "a"})
    return sample_of([{**turn, "content": turn["content"] or "a"} for turn in turns])


def result(encoder, sample):
    """The tokens of a sample, what of it is trained on and what is noted; or why it is refused."""
    try:
        made = encoder.encode(sample, **WIDE)
    except Exception as error:
        return type(error), str(error)
    notes = encoder.take_unwritten(), encoder.choice.take_notes(), encoder.take_control()
    return made and (made.prompt_ids, made.response_ids, made.spans), notes


@pytest.mark.parametrize("name", [*SHAPES, *PUBLISHED])
def test_known_shapes_write_what_the_template_writes(name, monkeypatch):
    tokenizer = tokenizer_with(name)
    knows, renders = SampleEncoder(tokenizer), SampleEncoder(tokenizer)
    split = KnownShapes.split
    generator = random.Random(name)
    for roles in ROLES:
        samples = [drawn(generator, roles, plain=True) for _ in range(3)]
        samples += [drawn(generator, roles, plain=number % 2 > 0) for number in range(8)]
        compare(monkeypatch, knows, renders, samples)
    assert KnownShapes.split is split


def compare(monkeypatch, knows, renders, samples):
    """Both encoders give the same of all samples; the second one renders each."""
    for sample in samples:
        made = result(knows, sample)
        with monkeypatch.context() as patched:
            patched.setattr(KnownShapes, "split", lambda *_: None)
            assert made == result(renders, sample), sample


# what opens the last answer of several alone, and the one that is asked for
OPENED_LAST = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and messages|length > 2 %}{{ 'Final:' }}{% endif %}"
    "{{ m.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' + ('Final:' if messages|length > 1 else '') }}{% endif %}"
)
LOOKS_TWICE = TURNS.replace(
    "m['content']", "('A' if 'brief' in messages[0].content and m.content | upper == 'YES' else m.content)"
)
REPLACES = TURNS.replace("m['content']", "m.content.replace('a', 'b')")


@pytest.mark.parametrize("system", [None, "Be brief.", " Be\n"])
@pytest.mark.parametrize("template", [OPENED_LAST, LOOKS_TWICE + HEADER, REPLACES + HEADER])
def test_texts_that_are_looked_for_are_looked_for_in_every_turn(template, system, monkeypatch):
    tokenizer = tokenizer_of(template)
    knows, renders = (
        SampleEncoder(tokenizer, chat=ChatTemplate.chosen(tokenizer, system_prompt=system)) for _ in range(2)
    )
    talks = ("a b c d", "e f g h", "q r s t", "i Final:j k l", "yes m n o")
    samples = [conversation(list(zip(*[iter(talk.split())] * 2, strict=True))) for talk in talks]
    compare(monkeypatch, knows, renders, samples)


def test_a_shape_is_learned_in_a_few_renderings_however_long_it_is(monkeypatch):
    renders, render = [], ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **b: renders.append(1) or render(*a, **b))
    for name in ("qwen3", "llama3", "gemma3"):
        encoder = SampleEncoder(tokenizer_with(name))
        for number in range(3):
            renders.clear()
            encoder.encode(conversation([(f"the question {i}", f"the answer {i} {number}") for i in range(40)]), **WIDE)
            assert len(renders) < (200, 20, 1)[number], name  # of the first one each short turn is looked at


def test_the_third_conversation_of_a_shape_is_not_rendered(monkeypatch):
    renders, render = [], ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **b: renders.append(1) or render(*a, **b))
    generator = random.Random(1)
    for name in ("qwen3", "llama3", "gemma3", "phi3", "qwen3_5_think", "gptoss", "gemma4", "deepseekv3", "glm4moe"):
        tokenizer = tokenizer_with(name)
        encoder = SampleEncoder(tokenizer, chat=ChatTemplate.chosen(tokenizer, date=DAY))
        for number in range(5):
            renders.clear()
            encoder.encode(drawn(generator, ROLES[2], plain=True), **WIDE)
            assert bool(renders) == (number < 2), (name, number)


@pytest.mark.parametrize(
    "content",
    ["m['content'] | upper", "m['content'][:20]", "'hidden' if 'secret' in m['content'] else m['content']"],
)
def test_a_template_that_looks_at_contents_is_asked_of_each_that_it_may_write_otherwise(content):
    tokenizer = tokenizer_of(TURNS.replace("m['content']", f"({content})") + HEADER)
    encoder = SampleEncoder(tokenizer, train_on="last")
    for question in ("ONE", "TWO", "THREE", "A SECRET", "FOUR", "A TEXT THAT IS OF TWENTY SIGNS AND MORE, a secret"):
        sample = sample_of([{"role": "user", "content": question}, {"role": "assistant", "content": "YES"}])
        written = tokenizer.apply_chat_template([*sample.messages], add_generation_prompt=True, tokenize=False)
        try:
            prompt = tokenizer.decode(encoder.encode(sample, **WIDE).prompt_ids)
        except BadRecord:
            prompt = None
        assert prompt == written or (prompt is None and question not in written)


def test_turns_with_more_than_a_role_and_a_text_are_rendered():
    named = TURNS.replace("m['role']", "(m.name or m['role'])")
    encoder = SampleEncoder(tokenizer_of(named + HEADER))
    question, answer = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}
    for _ in range(3):
        encoder.encode(sample_of([question, answer]), **WIDE)
    made = encoder.encode(sample_of([{**question, "name": "Ann"}, answer]), **WIDE)
    assert "Ann" in encoder.tokenizer.decode(made.prompt_ids)


def test_contents_that_the_template_reads_in_parts_are_followed_too(monkeypatch):
    parts = "{% for part in m['content'] %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
    template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}" + parts + "{{ '<|eot|>\n' }}{% endfor %}" + HEADER
    )
    encoder = SampleEncoder(tokenizer_of(template))
    samples = [conversation([(f"question {i}", f"answer {i}")]) for i in range(3)]
    encoder.encode(samples[0], **WIDE), encoder.encode(samples[1], **WIDE)
    monkeypatch.setattr(ChatTemplate, "render", None)
    made = encoder.encode(samples[2], **WIDE)
    assert encoder.tokenizer.decode(made.ids).endswith("question 2<|eot|>\n<|start|>assistant\nanswer 2<|eot|>")
