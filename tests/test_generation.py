"""Batched decoding gives what decoding alone gives."""

import torch
from tiny import tiny_model

from pocl_fast.generation import generate, generation_batches

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
    assert generation_batches(PROMPTS, 2) == [[2, 4], [0, 3], [1]]
