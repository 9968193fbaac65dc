"""The measurement of difficulty against transformers' own loss and greedy answers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import encoded_samples, student_model, teacher_model, transformers_loss

from pocl_fast.answers.evaluation import answer_all
from pocl_fast.answers.likelihood import LoadedModel, cross_entropy, response_scores
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.curriculum.measurer import measure, measure_teacher, rows_of
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.options import GenerationOptions


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


def measured(folder, samples, encoded, *, model=None, generation=None, **options):
    """The table that `measure` writes."""
    encoder, generation = SampleEncoder(tiny_tokenizer()), generation or GenerationOptions(5, generation_batch_size=3)
    output = folder / "d.parquet"
    student = LoadedModel(model or student_model(), True)
    rows = rows_of(samples, encoded)
    measure(student, rows, len(encoded), encoder, output, generation=generation, **options)
    assert [path.name for path in folder.iterdir() if path.name.startswith("d.")] == ["d.parquet"]
    return pq.read_table(output)


@pytest.mark.parametrize("piece", [4096, 5])
def test_measure_writes_one_row_a_sample_in_file_order(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("pocl_fast.system.resumable_table.PIECE", piece)
    samples, encoded = encoded_samples(9)
    kept = [sample for sample in encoded if sample.index != 4]  # one was left out
    table = measured(tmp_path, samples, kept)
    assert table["index"].to_pylist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert table["cross_entropy"].to_pylist() == pytest.approx([transformers_loss(tiny_model(), s) for s in kept])
    assert table["answer_length"].to_pylist() == [len(sample.response_ids) for sample in kept]
    assert table["prompt"].to_pylist() == [samples[sample.index].messages[-1]["content"] for sample in kept]
    assert table["reference"].to_pylist() == [samples[sample.index].references[0] for sample in kept]
    answers = table["answer"].to_pylist()
    references = [samples[sample.index].references for sample in kept]
    assert table["rouge_l"].to_pylist() == rouge_l(answers, [list(r) for r in references]).fmeasure.tolist()
    ids = torch.tensor([kept[0].prompt_ids])
    greedy = tiny_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert answers[0] == tiny_tokenizer().decode(greedy[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_one_sample_and_an_empty_answer_are_measured(tmp_path):
    samples, encoded = encoded_samples(1)
    silent = tiny_model()
    silent.lm_head = torch.nn.Linear(32, 259)  # of its own, and sure of the end token
    torch.nn.init.zeros_(silent.lm_head.weight)
    silent.lm_head.bias.data = 9.0 * (torch.arange(259) == 258)
    enable_packing(silent)
    table = measured(tmp_path, samples, encoded, model=silent)
    assert (table["answer"].to_pylist(), table["rouge_l"].to_pylist()) == ([""], [0.0])
    assert table["cross_entropy"].to_pylist() == pytest.approx([transformers_loss(silent, encoded[0])], rel=1e-5)


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


def test_the_teacher_s_columns_are_a_table_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("pocl_fast.curriculum.measurer.TEACHER_TOKENS", 150)  # several parts
    samples, encoded = encoded_samples(5)
    student, teacher = LoadedModel(student_model(), True), LoadedModel(teacher_model(), True)
    measure_teacher(student, teacher, rows_of(samples, encoded), 5, tmp_path / "t.parquet")
    table, want = pq.read_table(tmp_path / "t.parquet"), response_scores(student, encoded, teacher)
    assert table.column_names == ["index", "teacher_cross_entropy", "mean_kl"]
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    for name in ("teacher_cross_entropy", "mean_kl"):
        assert table[name].to_pylist() == pytest.approx(want[name].tolist(), rel=1e-5)


def test_sampled_answers_are_those_of_their_seed_and_sample(tmp_path):
    samples, encoded = encoded_samples(9)
    tables = {}
    for name, seed, batch in (("one", 1, 3), ("other batches", 1, 2), ("two", 2, 3)):
        (folder := tmp_path / name).mkdir()
        generation = GenerationOptions(5, generation_batch_size=batch)
        tables[name] = measured(folder, samples, encoded, generation=generation, temperature=1.0, seed=seed)
    assert tables["one"]["answer"].equals(tables["other batches"]["answer"])
    assert not tables["one"]["answer"].equals(tables["two"]["answer"])
    losses = [table["cross_entropy"].to_numpy() for table in tables.values()]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    np.testing.assert_array_equal(losses[2], losses[0])
    wanted = answer_all(
        student_model(),
        encoded,
        SampleEncoder(tiny_tokenizer()),
        max_new_tokens=5,
        batch_size=9,
        temperature=1.0,
        seed=2,
    )
    assert tables["two"]["answer"].to_pylist() == wanted
