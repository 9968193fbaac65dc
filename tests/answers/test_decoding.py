"""Batched decoding gives what decoding alone gives."""

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_fast.answers.decoding import choose, generate, generation_batches, numbers_a_token

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [42, 17], [100, 101, 102, 103]]
END = {258}


def run(model, prompts=PROMPTS, **kwargs):
    return generate(model, prompts, **{"max_new_tokens": 24, "end_ids": END, "pad_id": 256, **kwargs})


def test_greedy_answers_are_those_of_transformers_generate_one_by_one():
    model = tiny_model()
    # with random weights no answer would end: make some early token of each an end token, so that rows leave at
    # different times
    ends = {row[min(3 * i, len(row) - 1)] for i, row in enumerate(run(model))}
    got = run(model, end_ids=ends)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=sorted(ends))
        want = want[0, len(prompt) :].tolist()
        assert answer == (want[:-1] if want[-1] in ends else want)
    assert len({len(answer) for answer in got}) > 1


def test_the_batch_size_does_not_change_greedy_answers():
    model = tiny_model()
    assert run(model, batch_size=1) == run(model, batch_size=2) == run(model, batch_size=64)


def test_sampling_repeats_under_its_seed_and_differs_under_another():
    model = tiny_model()
    first, again, other = (run(model, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_sampled_answer_depends_on_its_sample_and_not_on_the_batch_it_is_in():
    model = tiny_model()
    ids = [7, 3, 11, 0, 5]
    want = run(model, temperature=1.0, seed=2, sample_ids=ids, batch_size=5)
    assert run(model, temperature=1.0, seed=2, sample_ids=ids, batch_size=2) == want
    for place, prompt in enumerate(PROMPTS):
        alone = run(model, [prompt], temperature=1.0, seed=2, sample_ids=ids[place : place + 1])
        assert alone == want[place : place + 1]
    same = run(model, [PROMPTS[0]] * 2, temperature=1.0, seed=2, sample_ids=[7, 8])
    assert same[0] != same[1] == run(model, [PROMPTS[0]], temperature=1.0, seed=2, sample_ids=[8])[0]


# none; one short of the rest; all of the shortest prompt (of which a token must be left)
@pytest.mark.parametrize("head", [0, 12, 20])
def test_a_common_head_changes_no_answer(head):
    model = tiny_model()
    common = list(range(30, 50))[:head]
    prompts = [common + prompt for prompt in ([7], [8, 9, 1], [8, 9, 2, 3])] + ([common] if head == 20 else [])
    together = run(model, prompts, batch_size=2)
    assert together == [run(model, [prompt])[0] for prompt in prompts]
    runs = []
    forward = model.forward
    model.forward = lambda **kwargs: runs.append(tuple(kwargs["input_ids"].shape)) or forward(**kwargs)
    run(model, prompts, batch_size=2, max_new_tokens=1)
    alone = {0: [], 12: [(1, 12)], 20: [(1, 19)]}[head]  # once for all batches
    assert [shape for shape in runs if shape[0] == 1 and shape[1] > 8] == alone


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama"])
def test_prompts_of_one_head_are_answered_as_alone_where_attention_has_a_window(family):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    window = {} if family == "llama" else {"sliding_window": 8}
    config = AutoConfig.for_model(family, vocab_size=260, num_key_value_heads=2, **sizes, **window)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)  # so that far tokens tell
    prompts = [[7] * 12 + list(range(20, 20 + n)) for n in (3, 40, 9, 1, 22)]
    ends = {row[3 + i] for i, row in enumerate(run(model, prompts, end_ids=set()))}
    for prompt, answer in zip(prompts, run(model, prompts, end_ids=ends), strict=True):
        assert answer == run(model, [prompt], end_ids=ends)[0]
        (want,) = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=sorted(ends), pad_token_id=256
        )
        want = want[len(prompt) :].tolist()
        assert answer == (want[:-1] if want[-1] in ends else want)


def gumbel(rows, vocab_size, seed=0):
    numbers = np.random.default_rng(seed).gumbel(size=(rows, numbers_a_token(vocab_size)))
    return torch.from_numpy(numbers.astype(np.float32))


# 5: less than a block; 256 and 257: a block, and one token more
@pytest.mark.parametrize("V", [5, 256, 257])
def test_sampling_never_takes_a_token_without_probability(V):
    logits = torch.full((2000, V), -float("inf"))
    logits[:, [1, V - 1]] = torch.tensor([0.0, 1.0])
    counts = torch.bincount(choose(logits, 1.0, gumbel(2000, V)), minlength=V)
    assert counts.sum() == counts[1] + counts[V - 1] == 2000
    assert counts[1] / 2000 == pytest.approx(1 / (1 + np.e), abs=0.04)  # four standard deviations


# temperatures that make it peaked and flat, over several blocks
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampled_tokens_have_their_probabilities(temperature):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2
    want = 20_000 * torch.softmax(logits.double() / temperature, -1)
    seen = torch.bincount(choose(logits.expand(20_000, -1), temperature, gumbel(20_000, 1000)), minlength=1000)
    often = want >= 20
    assert often.sum() > 20
    assert ((seen - want) / want.sqrt())[often].abs().max() < 4.5  # standard deviations
    assert abs(float((seen - want)[~often].sum())) < 4.5 * float(want[~often].sum().clamp_min(1)) ** 0.5


def test_rounding_of_the_logits_hardly_ever_changes_what_is_sampled():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1000, 20_000, generator=generator)  # flat: each token has 1 / 20,000 or so
    other = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    noise = gumbel(1000, 20_000)
    assert (choose(logits, 1.0, noise) != choose(other, 1.0, noise)).sum() <= 1


def test_sampling_follows_the_models_probabilities():
    model = tiny_model(seed=4)
    prompt = [5, 6, 7]
    want = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double(), -1)
    rows = run(model, [prompt] * 4000, temperature=1.0, seed=3, max_new_tokens=1, batch_size=4000, end_ids=set())
    counts = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=len(want)).double()
    assert (counts / counts.sum() - want).abs().sum() / 2 < 0.12  # total variation of 4000 draws over 259 tokens


def test_answers_stop_at_max_new_tokens_and_progress_counts_every_prompt():
    seen = []
    answers = run(tiny_model(), max_new_tokens=5, end_ids=set(), batch_size=2, progress=seen.append)
    assert [len(answer) for answer in answers] == [5] * 5
    assert sum(seen) == 5


def test_batches_hold_similar_lengths_longest_first():
    assert generation_batches(PROMPTS, batch_size=2) == [[2, 4], [0, 3], [1]]


def test_batches_stay_within_their_tokens_unless_a_prompt_alone_is_over():
    limits = {"batch_size": 3, "max_new_tokens": 4}
    # lengths 8, 4, 3, 2, 1 and the answers
    assert generation_batches(PROMPTS, **limits, batch_tokens=18) == [[2], [4, 0], [3, 1]]
    assert generation_batches(PROMPTS, **limits, batch_tokens=21) == [[2], [4, 0], [3, 1]]
    assert generation_batches(PROMPTS, **limits, batch_tokens=24) == [[2, 4], [0, 3, 1]]
    assert generation_batches(PROMPTS, **limits, batch_tokens=5) == [[2], [4], [0], [3], [1]]


def test_batches_end_where_their_padding_would_pass_its_limit():
    batches = [generation_batches(PROMPTS, batch_size=5, most_padding=most) for most in (0, 3, 4, 9, 22)]
    # lengths 8, 4, 3, 2, 1
    assert batches == [
        [[2], [4], [0], [3], [1]],
        [[2], [4, 0, 3], [1]],
        [[2, 4], [0, 3, 1]],
        [[2, 4, 0], [3, 1]],
        [[2, 4, 0, 3, 1]],
    ]


def test_a_token_budget_bounds_what_is_in_the_cache_and_changes_no_answer():
    model, seen = tiny_model(), []
    want = run(model)
    forward = model.forward
    model.forward = lambda **kwargs: seen.append(kwargs["attention_mask"].numel()) or forward(**kwargs)
    assert run(model, batch_tokens=70) == want
    assert 40 < max(seen) <= 70
