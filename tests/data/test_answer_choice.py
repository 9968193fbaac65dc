"""Which answers are trained on and how far: reasoning kept, taken out or alone, and conversations over the limits."""

from dataclasses import replace

import pytest
from template_shapes import (
    AGENT,
    DEEPSEEK,
    HEADER,
    QWEN3,
    TURNS,
    WIDE,
    answers,
    conversation,
    said,
    sample_of,
    tokenizer_of,
)
from tiny import tiny_tokenizer, write_jsonl

from pocl_fast.data.answer_choice import ENDS_EARLIER, STRIPPED
from pocl_fast.data.encoding import SampleEncoder, encoder_of
from pocl_fast.data.fitting import encode_all, fit_all
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import Sample, samples_from
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError
from pocl_fast.templates.decisions import Note

REPORTED = {**WIDE, "long_prompts": "error", "name": "x"}
THOUGHT = "<think>\nso\n</think>\n\nyes"
TALK = [said("user", "a"), said("assistant", THOUGHT), said("user", "b"), said("assistant", THOUGHT)]
OWN = [said("user", "a"), said("assistant", "yes", reasoning_content="so")]


def trained(tokenizer, sample, **options):
    """The texts that are trained on, the sample as it is used, and what is said of it."""
    encoder = SampleEncoder(tokenizer, **options)
    [(used, one)], report = fit_all([sample], encoder, **REPORTED)
    return [tokenizer.decode(one.ids[start:end]) for start, end in one.spans], used, report.describe("x")


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "count"), [(TALK, 2), (OWN, 1)], ids=["in the content", "own field"])
def test_reasoning_is_taken_out_of_every_answer_and_of_the_reference(turns, count):
    texts, used, report = trained(tokenizer_of(QWEN3), sample_of(turns), reasoning="strip")
    plain = [said("user", "a"), said("assistant", "yes"), said("user", "b"), said("assistant", "yes")][: len(turns)]
    assert texts == trained(tokenizer_of(QWEN3), sample_of(plain))[0]
    assert texts[-1] == "<think>\n\n</think>\n\nyes<|eot|>"
    assert used.references == ("yes",)
    assert f"answers from which reasoning was taken out: {count} (line 1)" in report
    assert "not trained on" not in report


def test_a_prompt_that_opens_reasoning_has_it_closed_empty_where_it_is_taken_out():
    texts, _, _ = trained(tokenizer_of(DEEPSEEK), sample_of(TALK), reasoning="strip")
    assert texts == ["yes<|end|>", "\n</think>\n\nyes<|end|>".lstrip("\n")]


def test_references_of_one_question_lose_their_reasoning_each():
    [sample] = samples_from([{"prompt": "a", "response": [THOUGHT, "no", "<think>x</think> maybe"]}], "x")
    for tokenizer in (tokenizer_of(TURNS + HEADER), tiny_tokenizer(chat=False)):
        _, used, _ = trained(tokenizer, sample, reasoning="strip")
        assert used.references == ("yes", "no", "maybe")


def test_a_word_about_tags_is_no_reasoning():
    sample = sample_of([said("user", "a"), said("assistant", "Close it with </think>, then go on.")])
    texts, _, report = trained(tokenizer_of(TURNS + HEADER), sample, reasoning="strip")
    assert texts == ["Close it with </think>, then go on.<|eot|>"]
    assert "taken out" not in report


def test_an_answer_of_reasoning_alone_is_a_bad_record_where_it_is_taken_out():
    sample = sample_of([said("user", "a"), said("assistant", "<think>\nso\n</think>")])
    with pytest.raises(BadRecord, match=r"x, line 1: an answer is nothing but reasoning") as caught:
        trained(tokenizer_of(QWEN3), sample, reasoning="strip")
    assert caught.value.kind == "nothing but reasoning"


@pytest.mark.parametrize("turns", [TALK, OWN], ids=["in the content", "own field"])
@pytest.mark.parametrize("which", ["last", "all"])
def test_reasoning_alone_is_trained_on_to_its_closing_tag_and_the_answer_stays_behind_it(turns, which):
    tokenizer = tokenizer_of(QWEN3)
    encoder = SampleEncoder(tokenizer, reasoning="only", train_on=which)
    one = encoder.encode(sample_of(turns), **WIDE)
    assert [tokenizer.decode(one.ids[start:end]) for start, end in one.spans] == ["<think>\nso\n</think>"]
    assert tokenizer.decode(one.response_ids).endswith("</think>\n\nyes<|eot|>")
    assert not one.truncated


def test_reasoning_alone_of_a_prompt_that_opens_it_and_of_earlier_turns():
    texts, _, _ = trained(tokenizer_of(DEEPSEEK), sample_of(TALK), reasoning="only")
    assert texts == ["so\n</think>"]
    keeping = tokenizer_of(TURNS + HEADER)
    assert trained(keeping, sample_of(TALK), reasoning="only")[0] == ["<think>\nso\n</think>"] * 2


def test_answers_without_reasoning_are_counted_and_samples_without_any_left_out():
    plain = conversation([("a", "b"), ("c", "d")])
    mixed = sample_of([said("user", "q"), said("assistant", "plain"), *TALK[2:]])
    samples = [replace(one, index=i, line=i + 1) for i, one in enumerate([plain, mixed])]
    tokenizer = tokenizer_of(TURNS + HEADER)
    encoder = SampleEncoder(tokenizer, reasoning="only")
    encoded, report = encode_all(samples, encoder, **REPORTED)
    assert [one.index for one in encoded] == [1]
    assert report.untrained == (1,)
    said_of = report.describe("x")
    assert "1 left out: no answer has reasoning (line 1)" in said_of
    assert "answers without reasoning, which are not trained on: 3 (lines 1, 2)" in said_of
    with pytest.raises(InputError, match="--reasoning only trains on reasoning alone, and no answer has any"):
        encode_all(samples[:1], encoder, **REPORTED)


def test_the_teachers_own_answers_are_not_cut_to_their_reasoning(tmp_path):
    options = DataOptions(data_source="teacher", reasoning="only")
    with pytest.raises(InputError, match="--reasoning only: with --data-source teacher"):
        encoder_of(tiny_tokenizer(), options, tmp_path, print)
    made = encoder_of(tiny_tokenizer(), DataOptions(data_source="teacher"), tmp_path, print)
    assert made.encode(conversation(), **WIDE).supervised == ()


# -- limits ------------------------------------------------------------------------------------------------------------

LONG = conversation([("one", "a" * 20), ("two", "b" * 20), ("three", "c" * 20), ("four", "d" * 20)])


def test_a_conversation_over_the_limit_ends_with_the_answer_that_the_limit_goes_through():
    tokenizer = tokenizer_of(TURNS + HEADER)
    encoder = SampleEncoder(tokenizer)
    whole = encoder.encode(LONG, **WIDE)
    for limit in range(whole.spans[0][1], len(whole) + 1):
        fitted = encoder.fit(LONG, max_length=limit, max_prompt_length=40)
        one, used = fitted.encoded, fitted.sample
        kept = [(start, min(end, limit)) for start, end in whole.spans if start < limit]
        assert one.spans == tuple(kept)
        assert one.ids == whole.ids[: kept[-1][1]]
        assert one.truncated == (kept[-1][1] < whole.spans[len(kept) - 1][1])
        assert used.references == ("abcd"[len(kept) - 1] * 20,)
        assert len(used.earlier) == len(kept) - 1
        assert one == replace(encoder.encode(used, max_length=limit, max_prompt_length=40), index=one.index)


def test_the_limit_of_prompts_counts_what_is_before_the_first_answer_that_is_trained_on():
    tokenizer = tokenizer_of(TURNS + HEADER)
    every, last = (SampleEncoder(tokenizer, train_on=which) for which in ("all", "last"))
    first, all_before = every.encode(LONG, **WIDE).spans[0][0], len(last.encode(LONG, **WIDE).prompt_ids)
    assert every.encode(LONG, max_length=900, max_prompt_length=first) is not None
    assert every.encode(LONG, max_length=900, max_prompt_length=first - 1) is None
    assert last.encode(LONG, max_length=900, max_prompt_length=all_before) is not None
    assert last.encode(LONG, max_length=900, max_prompt_length=all_before - 1) is None
    assert every.longest_prompt == all_before


def test_conversations_that_end_earlier_are_counted_and_have_their_own_references(tmp_path):
    samples = [replace(LONG, index=i, line=i + 1) for i in range(2)] + [
        replace(conversation([("a", "b")]), index=2, line=3)
    ]
    tokenizer = tokenizer_of(TURNS + HEADER)
    limits = {"max_length": 100, "max_prompt_length": 60, "long_prompts": "error", "name": "x"}
    fitted, report = fit_all(samples, SampleEncoder(tokenizer), **limits)
    assert [used.references[0][0] for used, _ in fitted] == ["b", "b", "b"]
    want = "conversations that end earlier for --max-length: 2 (lines 1, 2); answers left out so: 4"
    assert want in report.describe("x")


def test_an_answer_that_calls_tools_may_be_where_a_conversation_ends():
    whole = sample_of(AGENT)
    for place in whole.earlier:
        ends = whole.up_to(place)
        assert ends.answer_turn == whole.messages[place]
        assert ends.references[0]
        assert all(earlier < place for earlier in ends.earlier)
    found, last = answers(tokenizer_of(QWEN3), whole.up_to(whole.earlier[2]))
    assert len(found) == len(last) == 3


def test_a_stream_gives_the_same_samples_tokens_and_report(tmp_path, monkeypatch):
    turns = [*LONG.messages, said("assistant", "d" * 20)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    options = DataOptions(max_length=100, max_prompt_length=60)
    tokenizer = tokenizer_of(TURNS + HEADER)

    def with_earlier(samples):
        for sample in samples:
            places = (i for i, turn in enumerate(sample.messages) if turn["role"] == "assistant")
            yield replace(sample, earlier=tuple(places))

    from pocl_fast.data import stream
    from pocl_fast.records.samples import iter_samples

    monkeypatch.setattr(stream, "iter_samples", lambda *a, **b: with_earlier(iter_samples(*a, **b)))
    samples = list(stream.iter_samples(source_of(path)))
    limits = {"max_length": 100, "max_prompt_length": 60, "long_prompts": "error", "name": str(path)}
    fitted, report = fit_all(samples, SampleEncoder(tokenizer), **limits)
    streamed = SampleStream(source_of(path), SampleEncoder(tokenizer), options)
    assert streamed.check() == report
    assert [row for piece in streamed for row in piece] == fitted
    assert "answers left out so: 2" in report.describe("x")
    assert SampleSet([used for used, _ in fitted], [one for _, one in fitted]).samples[0].references == ("b" * 20,)


# -- what a template refuses -------------------------------------------------------------------------------------------

REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("template", "sample", "kind"),
    [
        (REFUSING, sample_of(TALK), "the template refuses it"),
        ("{{ 'x' }}", sample_of(TALK[:2]), "the template leaves the answer out"),
        (TURNS.replace("m['content']", "'q'", 1) + HEADER, sample_of(TALK[:2]), "the template leaves the answer out"),
        (
            "{% for m in messages if m.role != 'user' %}{{ m.content + '<|eot|>' }}{% endfor %}" + HEADER,
            sample_of(TALK[:2]),
            "the template leaves the question out",
        ),
        (TURNS + HEADER, replace(sample_of(TALK[:2]), tools=({"name": "sum"},)), "tools are not shown"),
        (TURNS + HEADER, sample_of(AGENT[:3]), "tool calls are not shown"),
        (None, sample_of(TALK), "the Alpaca template has no place for earlier turns"),
        (None, replace(sample_of(TALK[:2]), tools=({"name": "s"},)), "the Alpaca template has no place for tools"),
    ],
)
def test_what_a_template_does_with_a_record_is_a_kind_of_bad_record(template, sample, kind):
    tokenizer = tokenizer_of(template)
    with pytest.raises(BadRecord, match="line 1: ") as caught:
        encode_all([sample], SampleEncoder(tokenizer), **REPORTED)
    assert caught.value.kind == kind


def test_a_sample_ends_with_the_turn_that_it_is_cut_to():
    sample = Sample(0, 1, tuple(TALK[:3]), ("x",), earlier=(1,))
    assert sample.up_to(1) == Sample(0, 1, tuple(TALK[:1]), (THOUGHT,), instruction="a")


def test_a_note_says_what_it_counts():
    """Words and numbers are of one description: records first where both are counted."""
    ended = Note(ENDS_EARLIER, 5, (9, 10))
    assert ended.counts == {"conversations that end earlier for --max-length": 2, "answers left out so": 5}
    assert ended.describe("lines 9, 10") == (
        "conversations that end earlier for --max-length: 2 (lines 9, 10); answers left out so: 5"
    )
    stripped = Note(STRIPPED._replace(advice="do that"), 3, (8,))
    assert stripped.counts == {STRIPPED.answers: 3}
    assert stripped.describe("line 8") == "answers from which reasoning was taken out: 3 (line 8); do that"
