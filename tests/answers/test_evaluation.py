"""Scores of answers against the same computed by hand."""

import string

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import encoded_samples, student_model, teacher_model, transformers_loss

from pocl_fast.answers import evaluation
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.answers.evaluation import evaluate, mean_token_cross_entropy, references_of
from pocl_fast.answers.exact_match import exact_match
from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.records.samples import samples_from


def test_cross_entropy_of_a_set_weighs_every_token_alike(tmp_path):
    _, encoded = encoded_samples(9)
    losses = [transformers_loss(tiny_model(), sample) for sample in encoded]
    counts = [len(sample.response_ids) for sample in encoded]
    want = sum(a * n for a, n in zip(losses, counts, strict=True)) / sum(counts)
    assert mean_token_cross_entropy(student_model(), encoded, packed=True) == pytest.approx(want, rel=1e-5)
    assert want != pytest.approx(np.mean(losses), rel=1e-3)


def test_exact_match_passes_over_case_punctuation_and_spacing_and_takes_any_reference():
    answers = ["The  Cat!", "dog", "a b", ""]
    references = [["the cat"], ["cat", "Dog."], ["ab"], ["x"]]
    assert exact_match(answers, references) == 0.5


# what a text is compared as by the code of Super-NaturalInstructions
def _without_punctuation(text):
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<", ">"), ("+", "-"), ("?", "!"), ("...", "?"), ("==", "="), ("a<b", "a>b"), ("a + b", "a b"), ("~p", "p"),
        ("-5", "5"), ("x = -5", "x = 5"), ("(-3, 4)", "(3, 4)"), ("1.5", "15"), (".5", "5"), ("-.5", "5"),
        ("1:2", "12"), ("1/2", "12"), ("2^3", "23"), ("x^2", "x2"), ("2*3", "23"), ("2**3", "23"), ("50%", "50"),
        ("1990-2000", "19902000"), ("1,2,3", "123"), ("C++", "C"), ("p|q", "pq"), ("10:30", "1030"), ("3%2", "32"),
        ("5 * 3", "5 / 3"), ("5 / 3", "5 - 3"), ("5 - 3", "5 3"), ("5 ^ 3", "5 * 3"), ("a*b", "a/b"), ("a/b", "ab"),
        ("x-1", "x1"), ("1-x", "1x"), ("x - y", "x y"), ("-x", "x"), ("y = -x", "y = x"), ("!a", "a"), ("!(p)", "p"),
        ("a != b", "a = b"), ("1e-5", "1e5"), ("- 5", "5"), ("(a+b)*(c)", "(a+b)/(c)"), ("2*(3)", "2(3)"),
        ("width * height", "width height"), ("total - 5", "total 5"), ("5 * -3", "5 * 3"), ("x_1 - x_2", "x_1 x_2"),
    ],
)  # fmt: skip
def test_exact_match_keeps_what_mathematics_is_written_with(one, other):
    assert exact_match([one, other], [[other], [one]]) == 0.0
    assert exact_match([one, other], [[one], [other]]) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234,567", "1234567"), ("The answer: 5.", "the answer 5"), ("(b)", "B"), ("well-known", "wellknown"),
        ("COVID-19", "covid19"), ("No.5", "no5"), ("and/or", "andor"), ("**5**", "5"), ("5.", "5"), ("he/she", "heshe"),
        ('"yes"', "yes"), ("it's", "its"), ("e-mail!", "email"), ("snake_case", "snakecase"), ("Yes?", "yes"),
        ("- cat\n- dog", "cat dog"), ("* one\n* two", "one two"), ("5-year", "5year"), ("Wow!! 5", "wow 5"),
        ("so *very* good", "so very good"), ("Lima - the capital", "Lima the capital"),
    ],
)  # fmt: skip
def test_exact_match_passes_over_the_other_punctuation_as_the_published_code_does(one, other):
    assert _without_punctuation(one) == _without_punctuation(other)
    assert exact_match([one, other], [[other], [one]]) == 1.0


@pytest.mark.parametrize("reference", ["", " ", "?", "x"])
def test_an_empty_answer_equals_nothing(reference):
    assert exact_match(["", " "], [[reference], [reference]]) == 0.0


def test_a_tool_call_is_compared_as_the_template_writes_it():
    calls = [{"name": "f", "arguments": {"x": "1"}}]
    record = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    }
    [sample] = samples_from([record], "data")
    tokenizer = tiny_tokenizer()
    written = f"<call>{calls[0]['name']}</call>"
    one = EncodedSample(0, (1,), (*tokenizer(written).input_ids, tokenizer.eos_token_id), False)
    assert references_of(sample, one, SampleEncoder(tokenizer)) == [written]
    [plain] = samples_from([{"prompt": "q", "response": ["a", "b"]}], "data")
    assert references_of(plain, one, SampleEncoder(tokenizer)) == ["a", "b"]


def test_a_tool_call_behind_reasoning_is_compared_with_what_a_perfect_answer_is_read_as():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # Qwen3's: an empty block of reasoning before the last answer
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
        "{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}{{ m['content'] or '' }}"
        "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + '</call>' }}{% endfor %}"
        "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    encoder = SampleEncoder(tokenizer)
    for reasoning in ("", "They ask for f."):
        answer = {"role": "assistant", "content": "", "reasoning_content": reasoning}
        answer["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
        [sample] = samples_from([{"messages": [{"role": "user", "content": "q"}, answer]}], "data")
        one = encoder.encode(sample, max_length=200, max_prompt_length=100)
        assert reasoning in tokenizer.decode(one.response_ids)
        references = references_of(sample, one, encoder)
        assert references == ["<call>f</call>"]
        assert encoder.answer_texts([one.response_ids[:-1]], [references]) == references


def test_each_sample_is_scored_under_each_seed_and_in_percent(tmp_path, monkeypatch):
    samples, encoded = encoded_samples(4)  # references "0", "1 1", "2 2 2", "3 3 3 3"
    answers = {10: ["0", "1 1", "2 2 2", "no"], 20: ["no", "1", "no", "no"]}
    asked = []

    def scripted(engine, encoded, encoder, *, seed, temperature, **_):
        asked.append((seed, temperature))
        return answers[seed]

    monkeypatch.setattr(evaluation, "answer_all", scripted)
    student, encoder = student_model(), SampleEncoder(tiny_tokenizer())
    settings = {"engine": TorchEngine(student, 256), "seeds": (10, 20), "max_new_tokens": 4}
    made = evaluate(LoadedModel(student, True), SampleSet(samples, encoded), encoder, **settings)
    assert asked == [(10, 1.0), (20, 1.0)]
    assert [tuple(of_one) for of_one in made.answers] == list(zip(answers[10], answers[20], strict=True))
    # "1" for "1 1": precision 1, recall 1/2
    np.testing.assert_allclose(made.rouge_l, [[100, 0], [100, 200 / 3], [100, 0], [0, 0]])
    assert made.exact_match.tolist() == [[True, False], [True, False], [True, False], [False, False]]
    assert made.tokens.tolist() == [len(one.response_ids) for one in encoded]
    assert made.cross_entropy == pytest.approx([transformers_loss(tiny_model(), one) for one in encoded], rel=1e-5)
    assert made.mean_kl is None
    scores = made.summary()
    by_seed = [75.0, 100 * (2 / 3) / 4]
    assert scores.rouge_l == pytest.approx(np.mean(by_seed))
    assert scores.rouge_l_spread == pytest.approx((by_seed[0] - by_seed[1]) / 2)
    assert scores.exact_match == pytest.approx((75 + 0) / 2)
    assert scores.cross_entropy == pytest.approx(mean_token_cross_entropy(tiny_model(), encoded, packed=True), rel=1e-5)


def test_with_a_teacher_each_samples_divergence_from_it_is_that_of_both_models_logits():
    samples, encoded = encoded_samples(3)
    student, teacher, encoder = student_model(), teacher_model(), SampleEncoder(tiny_tokenizer())
    settings = {"engine": TorchEngine(student, 256), "seeds": [1], "max_new_tokens": 1}
    made = evaluate(
        LoadedModel(student, True),
        SampleSet(samples, encoded),
        encoder,
        teacher=LoadedModel(teacher, True),
        **settings,
    )
    ours, theirs = tiny_model(), tiny_model(layers=4, seed=1)
    for one, mean_kl in zip(encoded, made.mean_kl, strict=True):
        rows = slice(len(one.prompt_ids) - 1, -1)
        with torch.no_grad():
            q, p = (m(torch.tensor([one.ids])).logits[0, rows].double().log_softmax(-1) for m in (ours, theirs))
        assert mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(tmp_path):
    data = SampleSet(*encoded_samples(6))
    student, encoder = student_model(), SampleEncoder(tiny_tokenizer())
    settings = {"engine": TorchEngine(student, 256, batch_size=4), "max_new_tokens": 6}
    made = evaluate(LoadedModel(student, True), data, encoder, seeds=[10, 10, 20], **settings)
    one, two, three = zip(*made.answers, strict=True)
    assert one == two
    assert one != three
