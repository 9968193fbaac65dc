"""Cross-entropies and divergences of responses against those of transformers' own logits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_training import encoded_samples, student_model, teacher_model, transformers_loss

from pocl_fast.answers.likelihood import KeptStates, LoadedModel, cross_entropy, response_scores


@pytest.mark.parametrize("packed", [True, False])
def test_cross_entropy_is_transformers_own_loss_of_each_sample(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("pocl_fast.answers.likelihood.TOKENS_A_BATCH", 100)  # several batches
    monkeypatch.setattr("pocl_fast.answers.likelihood.ROWS_OF_LOGITS", 3)  # each of several parts
    _, encoded = encoded_samples(9)
    want = [transformers_loss(tiny_model(), sample) for sample in encoded]
    assert cross_entropy(student_model(), encoded, packed=packed) == pytest.approx(want, rel=1e-5)
    assert np.ptp(want) > 0.3  # so that an exchanged order would be seen


def test_cross_entropy_is_of_the_scaled_and_capped_logits_of_such_families(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(**sizes, **heads, logits_scaling=4.0, initializer_range=0.4, pad_token_id=256)
    model = GraniteForCausalLM(config).eval()
    _, encoded = encoded_samples(4)
    want = [transformers_loss(model, sample) for sample in encoded]
    assert cross_entropy(model, encoded, packed=False) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_teacher_s_scores_are_those_of_its_logits(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("pocl_fast.answers.likelihood.TOKENS_A_BATCH", 100)  # several batches
    monkeypatch.setattr("pocl_fast.answers.likelihood.ROWS_OF_LOGITS", 3)  # each of several parts
    _, encoded = encoded_samples(7)
    student, teacher = student_model(), teacher_model()
    scores = response_scores(LoadedModel(student, packed), encoded, LoadedModel(teacher, packed))
    assert scores["cross_entropy"] == pytest.approx([transformers_loss(tiny_model(), s) for s in encoded], rel=1e-5)
    # plain models: the others' attention is packed by now
    plain = tiny_model(layers=4, seed=1)
    assert scores["teacher_cross_entropy"] == pytest.approx([transformers_loss(plain, s) for s in encoded], rel=1e-5)
    for sample, mean_kl in zip(encoded, scores["mean_kl"], strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        rows = slice(len(sample.prompt_ids) - 1, -1)
        with torch.no_grad():
            q, p = (model(ids).logits[0, rows].double().log_softmax(-1) for model in (tiny_model(), plain))
        assert mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def forwards_of(model):
    """Counts the forwards of a model's decoder, in a list of one number."""
    count = [0]
    model.model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


def test_a_teacher_whose_states_are_kept_is_run_once_for_each_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("pocl_fast.answers.likelihood.TOKENS_A_BATCH", 100)  # several batches
    _, encoded = encoded_samples(7)
    student, teacher = LoadedModel(student_model(), True), LoadedModel(teacher_model(), True)
    keeping = LoadedModel(teacher.model, True, KeptStates())
    want = response_scores(student, encoded, teacher)
    forwards = forwards_of(teacher.model)
    first = response_scores(student, encoded, keeping)
    once = forwards[0]
    assert once > 1
    other = LoadedModel(tiny_model(seed=5), False)  # another student, in other batches
    again = [response_scores(student, encoded, keeping), response_scores(other, encoded[::-1], keeping)]
    alone = response_scores(keeping, encoded)
    assert forwards[0] == once
    for name in want:
        assert first[name].tolist() == again[0][name].tolist() == want[name].tolist()
    assert again[1]["teacher_cross_entropy"][::-1] == pytest.approx(want["teacher_cross_entropy"], rel=1e-6)
    assert alone["cross_entropy"] == pytest.approx(want["teacher_cross_entropy"], rel=1e-6)


def test_states_without_room_are_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pocl_fast.answers.likelihood.TOKENS_A_BATCH", 100)
    _, encoded = encoded_samples(7)
    student, teacher = LoadedModel(student_model(), True), teacher_model()
    want = response_scores(student, encoded, LoadedModel(teacher, True))
    hidden = 4 * teacher.config.hidden_size
    monkeypatch.setattr(
        "pocl_fast.answers.likelihood.KEPT_BYTES", hidden * sum(s.supervised_count for s in encoded) // 2
    )
    forwards, keeping = forwards_of(teacher), LoadedModel(teacher, True, KeptStates())
    counts = []
    for _ in range(2):
        found = response_scores(student, encoded, keeping)
        assert all(found[name].tolist() == want[name].tolist() for name in want)
        counts.append(forwards[0])
    assert 0 < counts[1] - counts[0] < counts[0]


def test_samples_that_differ_in_one_token_or_in_what_is_supervised_are_kept_apart():
    _, (one, *_) = encoded_samples(1)
    first_token = replace(one, response_ids=(7, *one.response_ids[1:]))
    in_prompt = replace(one, prompt_ids=(*one.prompt_ids[:-1], 7))
    last_alone = replace(one, supervised=((len(one) - 1, len(one)),))
    student, teacher, keeping = LoadedModel(student_model(), True), teacher_model(), KeptStates()
    found = []
    for sample in (one, first_token, in_prompt, last_alone):
        want = response_scores(student, [sample], LoadedModel(teacher, True))
        found.append(response_scores(student, [sample], LoadedModel(teacher, True, keeping))["mean_kl"].item())
        assert found[-1] == want["mean_kl"].item()
    assert len({*found}) == 4


def test_scoring_says_how_many_samples_are_done(monkeypatch):
    monkeypatch.setattr("pocl_fast.answers.likelihood.TOKENS_A_BATCH", 100)
    _, encoded = encoded_samples(7)
    done = []
    response_scores(LoadedModel(student_model(), True), encoded, progress=done.append)
    assert sum(done) == 7
    assert len(done) > 1


def test_a_line_says_once_how_many_samples_had_no_room(monkeypatch):
    _, encoded = encoded_samples(7)
    student, keeping = LoadedModel(student_model(), True), LoadedModel(teacher_model(), True, KeptStates())
    monkeypatch.setattr("pocl_fast.answers.likelihood.KEPT_BYTES", 1 << 20)
    response_scores(student, encoded[:3], keeping)
    assert keeping.kept.lacking() is None
    monkeypatch.setattr("pocl_fast.answers.likelihood.KEPT_BYTES", 1)
    for _ in range(2):
        response_scores(student, encoded, keeping)
    assert "hidden states of 7 held-out samples do not fit in 1 " in keeping.kept.lacking()
    assert keeping.kept.lacking() is None
