"""The measurement of difficulty against transformers' own loss and greedy answers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import encoded_samples, student_model, teacher_model, transformers_loss

from pocl_fast.answers.engine import TorchEngine
from pocl_fast.answers.evaluation import answer_all
from pocl_fast.answers.likelihood import LoadedModel, response_scores
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.curriculum.measurer import measure, measure_teacher, rows_of
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import BUILT_IN, TEACHER_SCORES, chosen_signals
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.models.packed_attention import enable_packing


def measured(folder, samples, encoded, *, model=None, batch_size=3, **sampling):
    """The table that `measure` writes."""
    encoder, output = SampleEncoder(tiny_tokenizer()), folder / "d.parquet"
    student = LoadedModel(model or student_model(), True)
    engine = TorchEngine(student.model, 256, batch_size)
    rows = rows_of(samples, encoded)
    measure(student, rows, len(encoded), encoder, output, engine=engine, max_new_tokens=5, **sampling)
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
        tables[name] = measured(folder, samples, encoded, batch_size=batch, temperature=1.0, seed=seed)
    assert tables["one"]["answer"].equals(tables["other batches"]["answer"])
    assert not tables["one"]["answer"].equals(tables["two"]["answer"])
    losses = [table["cross_entropy"].to_numpy() for table in tables.values()]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    np.testing.assert_array_equal(losses[2], losses[0])
    wanted = answer_all(
        TorchEngine(student_model(), 256, batch_size=9),
        encoded,
        SampleEncoder(tiny_tokenizer()),
        max_new_tokens=5,
        temperature=1.0,
        seed=2,
    )
    assert tables["two"]["answer"].to_pylist() == wanted


def test_every_built_in_signal_reads_what_is_measured(tmp_path):
    samples, encoded = encoded_samples(6)
    measured(tmp_path, samples, encoded)
    student, teacher = LoadedModel(student_model(), True), LoadedModel(teacher_model(), True)
    measure_teacher(student, teacher, rows_of(samples, encoded), 6, tmp_path / TEACHER_SCORES)
    known = read_scores(tmp_path / "d.parquet", chosen_signals(",".join(BUILT_IN)))
    assert len(known.scores) == len(BUILT_IN)
    assert all(np.isfinite(scores).all() for scores in known.scores)
