"""Training without a teacher is supervised fine-tuning: transformers' own cross-entropy, and nothing of a teacher."""

import math

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_training import (
    before_each_batch,
    curriculum_of,
    same_bits,
    student_model,
    teacher_model,
    train,
    trainer_of,
    weights_of,
)
from torch.nn.utils import clip_grad_norm_

from pocl_fast.curriculum.schedule import Place
from pocl_fast.data.packed import pack
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.micro_batches import MicroBatch
from pocl_fast.training.trainer import PoclTrainer

PLAIN = {"kind": "none", "supervised": True, "learning_rate": 2e-3}
OF_A_TEACHER = {"divergence", "teacher_entropy", "agreement", "temperature", "alpha"}


def transformers_loss(model, batch):
    """transformers' own loss of right-padded samples: the mean over all tokens of responses."""
    longest = max(map(len, batch))
    ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.int64)
    labels = torch.full((len(batch), longest), -100)
    for row, sample in enumerate(batch):
        ids[row, : len(sample)] = torch.tensor(sample.prompt_ids + sample.response_ids)
        mask[row, : len(sample)] = 1
        labels[row, len(sample.prompt_ids) : len(sample)] = torch.tensor(sample.response_ids)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_loss_and_gradient_are_those_of_transformers(tmp_path):
    trainer = trainer_of(tmp_path, count=6, dev=False, **PLAIN)
    batch = trainer.samples.encoded
    micro = MicroBatch(batch, pack(batch), Place(0, 0, 0, 0, 1, 1, 1.0))
    loss = trainer.compute_loss(trainer.model, micro, num_items_in_batch=torch.tensor(len(micro.packed.labels)))
    loss.backward()
    plain = student_model()
    want = transformers_loss(plain, batch)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    gradients = dict(plain.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=0, atol=1e-6)
        assert gradients[name].grad.abs().max() > 1e-3  # far above that tolerance


def test_training_equals_a_plain_loop_over_transformers_loss(tmp_path, monkeypatch):
    batches = []
    before_each_batch(monkeypatch, lambda number, trainer, samples: batches.append(samples))
    student = train(tmp_path, count=20, dev=False, epochs_per_stage=4, stages=1, logging_steps=1, **PLAIN)
    assert len(batches) == 20  # 4 passes of 5 steps

    plain = student_model()
    decay = [p for n, p in plain.named_parameters() if "norm" not in n]
    rest = [p for n, p in plain.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], weight_decay=0.01)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        loss = transformers_loss(plain, batch)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    logged = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in weights_of(student).items():
        torch.testing.assert_close(parameter, weights_of(plain)[name], rtol=1e-3, atol=1e-4)


def test_logs_and_tables_say_nothing_of_a_teacher(tmp_path, capsys):
    train(tmp_path, count=8, **PLAIN)
    said = capsys.readouterr().out
    assert "loss is the cross-entropy of the response" in said
    assert "accuracy" in said
    for word in ("KD", "agreement", "τ", "α", "teacher", "distil"):
        assert word not in said, word
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = [record for record in records if "loss" in record]
    assert losses
    assert all(0 <= record["accuracy"] <= 1 and record["ce"] > 0 for record in losses)
    assert all(OF_A_TEACHER.isdisjoint(record) for record in records)
    assert not (tmp_path / "teacher_cache").exists()


def test_stages_along_a_measured_curriculum_need_no_teacher(tmp_path):
    student = train(tmp_path, count=8, supervised=True, stages=2)
    assert not same_bits(weights_of(student), weights_of(student_model()))
    assert {record["stage"] for record in read_metrics(tmp_path / "metrics.jsonl")} == {0, 1}


def test_a_supervised_training_that_a_power_cut_stopped_goes_on_to_the_same_bits(tmp_path):
    options = PLAIN | {"count": 16, "stages": 1, "epochs_per_stage": 3}
    whole = weights_of(train(tmp_path / "whole", **options))

    def cut(number, *_):
        if number == 7:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        before_each_batch(patch, cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path / "cut", **options)
    assert same_bits(weights_of(train(tmp_path / "cut", **options)), whole)


# -- a teacher that is missing, and one that nothing needs -------------------------------------------------------------


# what needs a teacher, and what the message says of it
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"alpha": [1.0, 0.25]}, "alpha 0.25 leaves a part of the loss"),
        ({"alpha": [1.0, 1.0], "rollouts": "gkd"}, "rollouts 'gkd' compare the student's own answers"),
        ({"alpha": [1.0, 1.0], "data_source": "teacher"}, "data_source 'teacher' trains on a teacher's answers"),
        ({"alpha": [1.0, 1.0], "signals": "rouge_l,mean_kl"}, "the signals 'rouge_l,mean_kl' read a teacher"),
    ],
)
def test_what_needs_a_teacher_is_refused_without_one(tmp_path, options, why):
    with pytest.raises(InputError, match=r"^teacher is missing, and ") as wrong:
        trainer_of(tmp_path, count=8, **{"supervised": True} | options)
    assert why in str(wrong.value)
    assert "alpha=[1.0, 1.0]" in str(wrong.value)


def test_a_given_curriculum_says_whether_a_teacher_is_needed(tmp_path):
    with pytest.raises(InputError, match="teacher is missing, and alpha 0 leaves"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), supervised=True)
    supervised = curriculum_of(8, stages=2, alphas=[1.0, 1.0])
    trainer = trainer_of(tmp_path, curriculum=supervised, supervised=True, alpha=[0.3, 0.0], signals="mean_kl")
    assert trainer.teacher is None


def test_signals_that_read_a_teacher_are_fine_where_nothing_is_measured(tmp_path):
    assert trainer_of(tmp_path, count=8, signals="mean_kl", **PLAIN).teacher is None


def test_a_teacher_that_nothing_needs_is_named_and_not_loaded(tmp_path, capsys):
    trainer = trainer_of(tmp_path, count=8, teacher="nowhere/no-such-model", **PLAIN)
    assert "the teacher is not used: alpha is 1 in every stage" in capsys.readouterr().out
    assert trainer.teacher is None
    given = train(tmp_path / "given", count=8, teacher=teacher_model(), **PLAIN)
    alone = train(tmp_path / "alone", count=8, **PLAIN)
    assert same_bits(weights_of(given), weights_of(alone))


def test_a_teacher_whose_answers_are_trained_on_is_not_compared_with(tmp_path, capsys):
    trainer = trainer_of(tmp_path, count=8, teacher=teacher_model(), data_source="teacher", **PLAIN)
    trainer.train()
    assert trainer.teacher is None
    assert "KD" not in capsys.readouterr().out
    assert not list((tmp_path / "teacher_cache").glob("*.safetensors"))


def test_no_samples_are_refused(tmp_path):
    args = PoclConfig(output_dir=str(tmp_path), curriculum="none", stages=1, alpha=[1.0], use_cpu=True)
    with pytest.raises(InputError, match="train_dataset"):
        PoclTrainer(student_model(), None, args, [], None, tiny_tokenizer())
