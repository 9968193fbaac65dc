"""The measurement of difficulty against transformers' own loss and greedy answers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import encoded_samples, student_model, transformers_loss

from pocl_fast.difficulty import cross_entropy, measure, read_difficulty
from pocl_fast.errors import InputError
from pocl_fast.rouge import rouge_l
from pocl_fast.samples import SampleEncoder


@pytest.mark.parametrize("packed", [True, False])
def test_cross_entropy_is_transformers_own_loss_of_each_sample(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("pocl_fast.difficulty.TOKENS_A_BATCH", 100)  # several batches
    monkeypatch.setattr("pocl_fast.difficulty.ROWS_OF_LOGITS", 3)  # each of several parts
    _, encoded = encoded_samples(tmp_path, 9)
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
    _, encoded = encoded_samples(tmp_path, 4)
    want = [transformers_loss(model, sample) for sample in encoded]
    assert cross_entropy(model, encoded, packed=False) == pytest.approx(want, rel=1e-5)


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
