"""The engine of torch: which prompts it answers together, what it answers, and what it leaves of the model."""

from types import SimpleNamespace

import pytest
import torch
from ranks import gloo
from tiny import tiny_model, tiny_tokenizer

from pocl_fast.answers.decoding import generate
from pocl_fast.answers.engine import TorchEngine, own_ends
from pocl_fast.data.encoding import SampleEncoder

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [40, 41], [90, 91, 92, 93]]
SETTINGS = {"max_new_tokens": 6, "end_ids": {258}, "temperature": 1.0, "seed": 3}


def test_answers_are_those_of_the_sample_and_the_seed_in_whatever_batches():
    model = tiny_model()
    ids = [4, 0, 3, 1, 2]
    want = generate(model, PROMPTS, sample_ids=ids, pad_id=256, batch_size=1, **SETTINGS)
    for engine in (TorchEngine(model, 256, batch_size=2), TorchEngine(model, 256, batch_tokens=20)):
        assert engine.generate(PROMPTS, sample_ids=ids, **SETTINGS) == want
        for batch in engine.batches(PROMPTS, 6):  # as a caller does that keeps each batch's answers
            some = engine.generate(
                [PROMPTS[i] for i in batch], sample_ids=[[4, 0, 3, 1, 2][i] for i in batch], **SETTINGS
            )
            assert some == [want[i] for i in batch]


def test_batches_are_as_large_as_the_options_say():
    options = SimpleNamespace(generation_batch_size=3, generation_batch_tokens=18)
    engine = TorchEngine.of(tiny_model(), SampleEncoder(tiny_tokenizer()), options)
    assert engine.pad_id == 256
    assert engine.batches(PROMPTS, 5) == [[2], [4, 0], [3, 1]]  # of 13, 9 and 7 tokens a row
    assert engine.batches(PROMPTS, 1) == [[2, 4], [0, 3, 1]]  # of 9 and 4: the most rows


@pytest.mark.parametrize("ends", [258, [258, 65], (70, 71), None])
def test_answers_stop_where_the_models_own_generate_stops(ends):
    model = tiny_model()
    model.generation_config.eos_token_id = ends
    assert own_ends(model) == frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
    greedy = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0, "sample_ids": range(5)}
    answers = TorchEngine(model, 256).generate(PROMPTS, end_ids=(), **greedy)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=256)[0, len(prompt) :].tolist()
        assert answer == [token for token in want if token not in own_ends(model)]
    said = {token for answer in answers for token in answer}
    model.generation_config.eos_token_id = list(said)  # of whatever it says, it now says nothing
    assert TorchEngine(model, 256).generate(PROMPTS, end_ids=(), **greedy) == [[]] * 5


@pytest.mark.parametrize("training", [True, False])
def test_the_model_s_mode_comes_back_even_after_an_error(training):
    model = tiny_model().train(training)
    engine = TorchEngine(model, 256)
    engine.generate(PROMPTS, sample_ids=range(5), **SETTINGS)
    assert model.training == training

    def full(done):
        assert not model.training
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        engine.generate(PROMPTS, sample_ids=range(5), progress=full, **SETTINGS)
    assert model.training == training


def _shared():
    done = []
    engine = TorchEngine(tiny_model(), 256, batch_size=1)
    answers = engine.generate(PROMPTS, sample_ids=range(5), shared=True, progress=done.append, **SETTINGS)
    return answers, done


@gloo
def test_ranks_that_share_have_all_the_answers(two_ranks):
    want = TorchEngine(tiny_model(), 256, batch_size=1).generate(PROMPTS, sample_ids=range(5), **SETTINGS)
    (one, done), (two, also) = two_ranks(_shared)
    assert one == two == want
    assert sorted([done, also]) == [[2, 2], [2, 2, 2]]  # prompts, for both ranks at once
