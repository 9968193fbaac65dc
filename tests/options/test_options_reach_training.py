"""Every option that only a training shows, set to a value that is not its default, reaches what it is for: the plan of
the steps, the loss, the optimizer, the lines of the log. test_options_reach.py has the others, and counts all."""

import json

import accelerate
import numpy as np
import pytest
import torch
import transformers
from tiny_options import reaches
from tiny_training import before_each_batch
from transformers.models.llama.modeling_llama import LlamaMLP

from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.rollouts import Rollouts
from pocl_fast.training.trainer import PoclTrainer

# -- the plan of a training --------------------------------------------------------------------------------------------


@reaches("warmup_epochs", "warmup_steps", "warmup_learning_rate")
def test_the_student_is_warmed_up_as_it_is_told(changed, run_of):
    rate, steps = changed.pop("warmup_learning_rate"), {}
    for name, value in changed.items():  # one of the two; 6 samples are 3 steps of 2
        run = run_of(name, batch_size=2, warmup_learning_rate=rate, logging_steps=1.0, **{name: value})
        run.measure()
        records = read_metrics(run.path / "warmup" / "metrics.jsonl")
        steps[name] = records[-1]["step"]
        assert max(record["learning_rate"] for record in records) == pytest.approx(rate)
    assert steps == {"warmup_epochs": 2 * 3, "warmup_steps": 3}


@reaches("epochs_per_stage")
def test_a_stage_has_its_passes(changed, trainer_with):
    assert trainer_with(changed).planned().total_steps == 3 * 2


@reaches("steps_per_stage")
def test_a_stage_has_its_steps(changed, trainer_with):
    assert trainer_with(changed).planned().total_steps == 5


@reaches("stage_length")
def test_stages_share_their_steps(changed, trainer_with):
    schedule = trainer_with(changed, stages=2, epochs_per_stage=3).planned()  # of 4 and 8 samples: 3 + 6 steps
    assert [schedule.planned_steps(stage) for stage in range(2)] == [4, 5]


@reaches("pacing", "initial_competence", "full_competence")
def test_the_samples_that_may_be_drawn_grow_with_each_step(changed, trainer_with):
    schedule = trainer_with(changed, count=40, per_device_train_batch_size=10, epochs_per_stage=8).planned()
    assert schedule.total_steps == 32
    drawn = [schedule.batch(step, 0) for step in range(32)]
    assert sorted(drawn[0]) == list(range(10))  # the easiest quarter of 40, in file order
    hardest = np.maximum.accumulate([max(batch) for batch in drawn]).tolist()
    assert hardest[8] < 40 * (0.5 + 0.5 * 0.25**2) ** 0.5  # c² has grown half of its way from 0.25² to 1
    assert hardest[-1] == 39
    assert next(step for step in range(32) if hardest[step] >= 38) >= 14


@reaches("batch_size", "gradient_accumulation_steps")
def test_a_step_has_batches_of_so_many_samples(changed, trainer_with):
    schedule = trainer_with(changed).planned()
    assert [len(schedule.batch(0, part)) for part in range(2)] == [2, 2]
    assert schedule.total_steps == 2


@reaches("tokens_per_batch")
def test_a_batch_has_so_many_tokens(changed, trainer_with):
    trainer = trainer_with(changed)
    lengths = {sample.index: len(sample) for sample in trainer.samples.encoded}
    batches = [trainer.planned().batch(step, 0) for step in range(trainer.planned().total_steps)]
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 50 for batch in batches)
    assert len(batches) > 2


@reaches("within_stage")
def test_temperature_moves_within_a_stage(changed, trainer_with):
    schedule = trainer_with(changed, stages=2, per_device_train_batch_size=2).planned()
    settings = [schedule.setting(schedule.place(step)) for step in range(schedule.total_steps)]
    assert settings[0] != settings[1]
    assert len(set(settings)) == 3  # two steps of the first stage; the last stage moves no further


@reaches("seed")
def test_the_order_of_samples_follows_the_seed(changed, trainer_with):
    def order(trainer):
        return [trainer.planned().batch(step, 0) for step in range(2)]

    assert order(trainer_with(changed)) != order(trainer_with({}, folder="other"))


# -- a training --------------------------------------------------------------------------------------------------------


@reaches("divergence", "beta", "skew", "temperature_scaling")
def test_the_loss_is_the_chosen_one(changed, trainer_with, monkeypatch):
    seen = []
    before_each_batch(monkeypatch, lambda _number, trainer, _samples: seen.append(trainer.objective))
    trainer_with(changed, dev=False, per_device_train_batch_size=8).train()
    assert {name: getattr(seen[0], name) for name in changed} == changed


@reaches("learning_rate", "weight_decay")
def test_the_optimizer_has_the_learning_rate_and_the_decay(changed, trainer_with):
    [first, *_] = trainer_with(changed).create_optimizer().param_groups
    assert (first["lr"], first["weight_decay"]) == (3e-3, 0.2)


@reaches("set")
def test_any_argument_of_transformers_is_the_trainers(changed, trainer_with):
    trainer = trainer_with(changed)
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
    trainer.create_scheduler(2)
    assert [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(3)] == [1.0, 0.5, 0.0]  # linear, and no cosine


@reaches(
    "fresh_optimizer",
    "fresh_learning_rate",
    "stage_weights",
    "max_grad_norm",
    "activation_checkpointing",
    "logging_steps",
    "report_to",
)
def test_a_training_goes_on_over_its_stages_as_it_is_told(changed, trainer_with, monkeypatch, tmp_path):
    rates, states, layers, norms = [], [], [], []
    clip, forward = accelerate.Accelerator.clip_grad_norm_, LlamaMLP.forward

    def clipped(self, parameters, max_norm, *args, **kwargs):
        norms.append(max_norm)
        return clip(self, parameters, max_norm, *args, **kwargs)

    def look(_number, trainer, _samples):
        optimizer = trainer.optimizer
        rates.append(optimizer.param_groups[0]["lr"])
        states.append({int(state["step"]) for state in optimizer.state.values()})

    def counted(self, hidden):
        layers.extend([self] if self.training else [])
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", clipped)
    before_each_batch(monkeypatch, look)
    trainer = trainer_with(changed, stages=2, save_strategy="no")
    trainer.train()
    assert states == [set(), set(), {1}]  # the second stage has none of the first's state
    assert rates == pytest.approx([1e-4, 1e-4, 0.5e-4])  # a cosine over one step, and one over two
    assert norms == [0.5] * 3
    assert len(layers) == 3 * 2 * 2  # batches, layers, and each of them again in backward
    assert not list((tmp_path / "out").glob("*best*"))  # no stage starts from the best weights of another
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


@reaches("patience", "remeasure", "on_nonfinite", "save_minutes")
def test_a_stage_ends_and_begins_as_it_is_told(changed, trainer_with, monkeypatch, tmp_path):
    compute_loss, count, saved = PoclTrainer.compute_loss, [0], []

    def poisoned(self, *args, **kwargs):
        count[0] += 1
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if count[0] == 1 else loss

    class Saves(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            saved.append(state.global_step)

    monkeypatch.setattr(PoclTrainer, "compute_loss", poisoned)
    settings = {
        "epochs_per_stage": 4,
        "per_device_train_batch_size": 2,
        "callbacks": [Saves()],
        "signals": "cross_entropy",
    }
    monkeypatch.setattr(PoclTrainer, "evaluate", constant_scores)
    trainer = trainer_with(changed, count=4, given=False, stages=2, **settings)
    trainer.args.stages = 2
    trainer.train()
    assert trainer.state.global_step == 2 + 4  # two passes of one step, two of two: the second brought nothing
    assert saved == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out" / "stage-2" / "difficulty.parquet").is_file()
    assert trainer.progress.skipped_steps == 1


def constant_scores(self, *_, **__):
    metrics = {"eval_rouge_l": 1.0, "eval_cross_entropy": 1.0, "eval_seconds": 0.0}
    self.log(dict(metrics))
    self.evaluates_dev = True
    self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
    return metrics


@reaches("rollouts", "lmbda", "mixed_alpha", "loss_eps", "replay_ratio", "replay_capacity")
def test_the_students_own_answers_follow_the_policy(changed, trainer_with, monkeypatch):
    policies, begin = [], Rollouts.__init__

    def init(self, policy, *args, **kwargs):
        policies.append(policy)
        begin(self, policy, *args, **kwargs)

    monkeypatch.setattr(Rollouts, "__init__", init)
    trainer_with(changed).planned()
    assert {name: getattr(policies[0], name) for name in changed} == changed
