"""Whole runs of `pocl-fast distill` with teachers of families that are not plain: measured, cut, trained, answered.

What a run leaves is compared with transformers alone: the trained student's files give finite logits, those of
pocl-fast, and the cross-entropy that the run reports.
"""

import json

import pytest
import torch
from tiny import arithmetic, tiny_tokenizer, write_jsonl
from tiny_run import options, run, score_rows, scores_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from families.alone import check_each
from families.tiny_families import row_model
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.packed import pack
from pocl_fast.models.loading import load_model
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.records.samples import read_samples

ALWAYS = ("gemma3", "lfm2")  # in `make test` too
NAMES = (
    "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4-own-keys", "gemma4_text", "gemma4_text-own-keys",
    "gpt_oss", "granitemoehybrid", "lfm2", "qwen3_5", "qwen3_5_text", "qwen3_next",
)  # fmt: skip


def inputs_of(name, folder):
    """A teacher of the family with a tokenizer, and a few samples."""
    row_model(name).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    write_jsonl(folder / "train.jsonl", arithmetic(12))
    write_jsonl(folder / "dev.jsonl", arithmetic(4, start=100))
    return folder


def dev_samples(folder):
    encoder = SampleEncoder(AutoTokenizer.from_pretrained(folder / "teacher"))
    samples = read_samples(folder / "dev.jsonl")
    return encode_all(samples, encoder, max_length=96, max_prompt_length=80, long_prompts="error", name="dev")[0]


def by_transformers(student, samples):
    """Logits that predict each response, by plain transformers on each sample alone."""
    model = AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager").eval()
    assert model.config.get_text_config().num_hidden_layers == 2
    logits = []
    for one in samples:
        ids = torch.tensor([one.prompt_ids + one.response_ids])
        with torch.no_grad():
            logits.append(model(input_ids=ids, use_cache=False).logits[0, len(one.prompt_ids) - 1 : -1])
    return logits


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.families(always=n in ALWAYS)) for n in NAMES])
def test_a_run_with_this_family_leaves_a_student_that_transformers_reads(name, tmp_path):
    inputs, output = inputs_of(name, tmp_path), tmp_path / "run"
    words = options(inputs, student_layers=2, stages=2, eval_seeds=(10,), learning_rate=2e-3)
    assert run("distill", output, *words) == 0

    assert (output / "difficulty.parquet").is_file()
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in metrics if "loss" in record} == {0, 1}
    assert len(score_rows(output, "after")) == 4

    samples = dev_samples(inputs)
    want = by_transformers(output / "student", samples)
    assert all(logits.isfinite().all() for logits in want)
    model = load_model(str(output / "student"))
    packed = packing_ready(model, lambda _: None)
    with torch.no_grad():
        got = supervised_logits(model, pack(samples), packed=packed)
    check_each(got.split([len(one.response_ids) for one in samples]), want, "logits")

    labels = torch.tensor([token for one in samples for token in one.response_ids])
    scores = scores_of(output)
    assert scores["after"]["cross_entropy"] == pytest.approx(float(cross_entropy(torch.cat(want), labels)), rel=1e-4)
    assert scores["after"]["cross_entropy"] != scores["before"]["cross_entropy"]
