"""Scores of answers, and the measurement of difficulty, against the same computed by hand and by transformers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import encoded_samples, student_model

from pocl_fast import evaluation
from pocl_fast.difficulty import cross_entropy, measure, read_difficulty
from pocl_fast.errors import InputError
from pocl_fast.evaluation import evaluate, exact_match, mean_token_cross_entropy
from pocl_fast.rouge import rouge_l
from pocl_fast.samples import SampleEncoder


def transformers_loss(model, sample):
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    labels = ids.clone()
    labels[:, : len(sample.prompt_ids)] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


@pytest.mark.parametrize("packed", [True, False])
def test_cross_entropy_is_transformers_own_loss_of_each_sample(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("pocl_fast.difficulty.TOKENS_A_BATCH", 100)  # several batches
    _, encoded = encoded_samples(tmp_path, 9)
    want = [transformers_loss(tiny_model(), sample) for sample in encoded]
    assert cross_entropy(student_model(), encoded, packed=packed) == pytest.approx(want, rel=1e-5)
    assert np.ptp(want) > 0.3  # so that an exchanged order would be seen


def test_cross_entropy_of_a_set_weighs_every_token_alike(tmp_path):
    _, encoded = encoded_samples(tmp_path, 9)
    losses = [transformers_loss(tiny_model(), sample) for sample in encoded]
    counts = [len(sample.response_ids) for sample in encoded]
    want = sum(a * n for a, n in zip(losses, counts, strict=True)) / sum(counts)
    assert mean_token_cross_entropy(student_model(), encoded, packed=True) == pytest.approx(want, rel=1e-5)
    assert want != pytest.approx(np.mean(losses), rel=1e-3)


def test_exact_match_passes_over_case_punctuation_and_spacing_and_takes_any_reference():
    answers = ["The  Cat!", "dog", "a b", ""]
    references = [["the cat"], ["cat", "Dog."], ["ab"], ["x"]]
    assert exact_match(answers, references) == 0.5


def test_scores_are_means_and_spread_over_the_seeds_of_means_over_the_samples(tmp_path, monkeypatch):
    samples, encoded = encoded_samples(tmp_path, 4)  # references "0", "1 1", "2 2 2", "3 3 3 3"
    answers = {10: ["0", "1 1", "2 2 2", "no"], 20: ["no", "1", "no", "no"]}
    asked = []

    def scripted(model, encoded, encoder, *, seed, temperature, **_):
        asked.append((seed, temperature))
        return answers[seed]

    monkeypatch.setattr(evaluation, "answer_all", scripted)
    settings = {"seeds": (10, 20), "max_new_tokens": 4, "batch_size": 2, "packed": True}
    scores, first = evaluate(student_model(), samples, encoded, SampleEncoder(tiny_tokenizer()), **settings)
    assert asked == [(10, 1.0), (20, 1.0)]
    assert first == answers[10]
    by_seed = [75.0, 100 * (2 / 3) / 4]  # "1" for "1 1": precision 1, recall 1/2
    assert scores.rouge_l == pytest.approx(np.mean(by_seed))
    assert scores.rouge_l_spread == pytest.approx((by_seed[0] - by_seed[1]) / 2)
    assert scores.exact_match == pytest.approx((75 + 0) / 2)
    assert scores.cross_entropy == pytest.approx(mean_token_cross_entropy(tiny_model(), encoded, packed=True), rel=1e-5)
    assert (scores.seeds, scores.samples) == ((10, 20), 4)
    assert scores.to_dict()["rouge_l"] == scores.rouge_l


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(tmp_path):
    samples, encoded = encoded_samples(tmp_path, 6)
    encoder = SampleEncoder(tiny_tokenizer())
    settings = {"max_new_tokens": 6, "batch_size": 4, "packed": True}
    one, two, three = (
        evaluate(student_model(), samples, encoded, encoder, seeds=[seed], **settings)[1] for seed in (10, 10, 20)
    )
    assert one == two
    assert one != three


def test_measure_writes_one_row_a_sample_in_file_order(tmp_path):
    samples, encoded = encoded_samples(tmp_path, 9)
    kept = [sample for sample in encoded if sample.index != 4]  # one was left out
    encoder = SampleEncoder(tiny_tokenizer())
    settings = {"max_new_tokens": 5, "packed": True}
    table = measure(student_model(), samples, kept, encoder, tmp_path / "d.parquet", batch_size=3, **settings)
    assert table.equals(pq.read_table(tmp_path / "d.parquet"))
    assert table["index"].to_pylist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert table["cross_entropy"].to_pylist() == pytest.approx([transformers_loss(tiny_model(), s) for s in kept])
    answers = table["answer"].to_pylist()
    references = [samples[sample.index].references for sample in kept]
    assert table["rouge_l"].to_pylist() == rouge_l(answers, [list(r) for r in references]).fmeasure.tolist()
    ids = torch.tensor([kept[0].prompt_ids])
    greedy = tiny_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert answers[0] == tiny_tokenizer().decode(greedy[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_missing_damaged_or_foreign_difficulty_table_is_one_clear_error(tmp_path):
    path = tmp_path / "difficulty.parquet"
    with pytest.raises(InputError, match="is not there: run `pocl-fast measure` first"):
        read_difficulty(path)
    pq.write_table(pa.table({"index": [0], "rouge_l": [0.5]}), path)
    with pytest.raises(InputError, match=r"lacks the columns \['cross_entropy'\]"):
        read_difficulty(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="is damaged"):
        read_difficulty(path)
