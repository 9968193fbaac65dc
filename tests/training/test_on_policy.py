"""Training on the student's own answers and on the teacher's."""

import os
import signal

import pytest
import torch
from tiny_run import options, read_json, run
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
from torch.nn.functional import kl_div, log_softmax

from pocl_fast.answers.decoding import generate
from pocl_fast.system.errors import Interrupted
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.trainer import PoclTrainer

SETTING = {"max_new_tokens": 4, "learning_rate": 1e-3, "logging_steps": 1}


def curriculum():
    return curriculum_of(16, stages=2)  # steps of 4 samples: 2, then 4 a pass


def seen_batches(monkeypatch):
    """The micro-batches that training gets."""
    seen = []
    compute_loss = PoclTrainer.compute_loss

    def looked(self, model, inputs, *args, **kwargs):
        seen.append(inputs)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PoclTrainer, "compute_loss", looked)
    return seen


def test_gkd_trains_on_the_students_own_samples_with_the_divergence_alone(tmp_path, monkeypatch):
    seen = seen_batches(monkeypatch)
    student, teacher = student_model(), teacher_model()
    setting = {**SETTING, "rollouts": "gkd", "lmbda": 1.0, "divergence": "reverse_kl"}
    curriculum = curriculum_of(4, stages=1, temperatures=[1.5], alphas=[0.3])
    trainer = trainer_of(tmp_path, curriculum=curriculum, student=student, teacher=teacher, **setting)
    before = student_model()
    trainer.train()
    [batch] = seen
    assert batch.live
    data = {sample.index: sample for sample in trainer.samples.encoded}
    total, tokens = 0.0, 0
    for sample in batch.samples:
        assert sample.prompt_ids == data[sample.index].prompt_ids
        assert sample.response_ids != data[sample.index].response_ids
        assert 1 <= len(sample.response_ids) <= 4
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        place = slice(len(sample.prompt_ids) - 1, -1)
        with torch.no_grad():
            q, p = (log_softmax(model(input_ids=ids).logits[0, place] / 1.5, -1) for model in (before, teacher))
        total += float(kl_div(p, q, log_target=True, reduction="sum")) * 1.5**2
        tokens += len(sample.response_ids)
    [loss] = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_the_answers_are_the_students_of_that_step_and_the_same_in_any_batch(tmp_path, monkeypatch):
    seen = seen_batches(monkeypatch)
    models = []
    look = PoclTrainer.get_batch_samples

    def looked(self, *args):
        models.append(weights_of(self.model))
        return look(self, *args)

    monkeypatch.setattr(PoclTrainer, "get_batch_samples", looked)
    setting = {**SETTING, "rollouts": "gkd", "lmbda": 1.0, "learning_rate": 5e-2}
    trainer = trainer_of(tmp_path, curriculum=curriculum(), **setting)
    trainer.train()
    student = student_model()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(models[3][name])
    ask = trainer.rollouts
    one = seen[3].samples[0]
    ask._generate = lambda prompts, ids, seed: generate(
        student,
        prompts,
        max_new_tokens=4,
        end_ids=trainer.encoder.end_ids,
        pad_id=256,
        temperature=1.0,
        seed=seed,
        sample_ids=ids,
    )
    assert ask.batch([one], 3).samples == [one]


@pytest.mark.parametrize(
    "rollouts", [pytest.param("gkd", marks=pytest.mark.full), "mixed"]
)  # which has a buffer besides
def test_a_run_with_rollouts_that_was_stopped_goes_on_to_the_same_bits(tmp_path, rollouts):
    setting = {**SETTING, "curriculum": curriculum(), "rollouts": rollouts, "replay_capacity": 6, "epochs_per_stage": 2}
    whole = train(tmp_path / "whole", **setting)
    with pytest.MonkeyPatch.context() as patch:
        before_each_batch(patch, lambda number, *_: os.kill(os.getpid(), signal.SIGINT) if number == 7 else None)
        with pytest.raises(Interrupted):
            train(tmp_path / "cut", **setting)
    assert same_bits(weights_of(train(tmp_path / "cut", **setting)), weights_of(whole))
    names = ("step", "loss", "divergence", "generated", "eval_cross_entropy")
    kept = [
        [{n: r[n] for n in names if n in r} for r in read_metrics(tmp_path / f / "metrics.jsonl")]
        for f in ("whole", "cut")
    ]
    assert kept[0] == kept[1]
    assert kept[0][-2]["generated"] > 0


def test_adaptive_asks_the_student_more_often_when_the_dev_loss_rises(tmp_path, monkeypatch):
    losses = iter([3.0, 2.5, 3.2, 3.25, 3.4, 3.4])  # before training; then at each of five passes
    monkeypatch.setattr("pocl_fast.answers.evaluation.mean_token_cross_entropy", lambda *_, **__: next(losses))
    setting = {**SETTING, "rollouts": "adaptive", "loss_eps": 0.1, "replay_capacity": 4, "epochs_per_stage": 5}
    train(tmp_path, curriculum=curriculum_of(4, stages=1), **setting)
    thresholds = [r["rollout_threshold"] for r in read_metrics(tmp_path / "metrics.jsonl") if "rollout_threshold" in r]
    assert thresholds == [0.0, 0.0, 0.1, 0.1, 0.2]  # 3.2 and then 3.4 are over the last that counted by 0.1


def test_the_teachers_body_stays_and_its_cache_holds_no_rollouts(tmp_path):
    setting = {**SETTING, "rollouts": "gkd", "lmbda": 0.5, "epochs_per_stage": 3}
    trainer = trainer_of(tmp_path, curriculum=curriculum(), teacher=teacher_model(), **setting)
    trainer.train()
    assert trainer.rollouts.generated > 0
    assert trainer.teacher.model is not None
    cached = sum(len(shard) for shard in trainer.teacher.cache._shards.values())
    assert cached <= 16
    shares = [r["generation_share"] for r in read_metrics(tmp_path / "metrics.jsonl") if "generation_share" in r]
    assert 0 < max(shares) < 1


def test_the_teachers_answers_take_the_references_place(tmp_path):
    teacher = teacher_model()
    setting = {"count": 8, "max_new_tokens": 4, "data_source": "teacher"}
    trainer = trainer_of(tmp_path, teacher=teacher, **setting)
    for sample in trainer.samples.encoded:
        want = teacher.generate(
            torch.tensor([sample.prompt_ids]), max_new_tokens=4, do_sample=False, eos_token_id=258, pad_token_id=256
        )[0, len(sample.prompt_ids) :].tolist()
        assert list(sample.response_ids) == want
        text = trainer.encoder.tokenizer.decode(want, skip_special_tokens=True).strip()
        assert trainer.samples.samples[sample.index].references == (text,)
    trainer.train()
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    again = trainer_of(tmp_path, teacher=teacher, **setting)
    assert again.samples.encoded == trainer.samples.encoded
    assert len(asked) < 12  # checks of the packing, no generation of eight answers


def test_a_run_on_the_teachers_answers_and_rollouts_from_the_command_line(finished, tmp_path):
    inputs, _ = finished
    words = options(inputs, data_source="teacher", rollouts="mixed", max_new_tokens=4)
    assert run("distill", tmp_path / "out", *words) == 0
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    answers = list((tmp_path / "out" / "teacher_answers").rglob("answers-0.jsonl"))
    assert len(answers[0].read_text().splitlines()) == 24
    made_from = read_json(tmp_path / "out" / "steps.json")["measure"]["made_from"]
    assert made_from["data_source"] == "teacher"
    assert "teacher answers" in made_from
