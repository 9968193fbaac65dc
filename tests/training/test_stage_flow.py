"""Stages: when they end, and what goes on into the next one."""

import math

import numpy as np
import pytest
from tiny_training import before_each_batch, curriculum_of, encoded_samples, same_bits, train, trainer_of, weights_of
from transformers import TrainerCallback

from pocl_fast.data.sample_set import SampleSet
from pocl_fast.system.errors import InputError
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.trainer import PoclTrainer


def metrics(folder, name):
    return {r["step"]: r[name] for r in read_metrics(folder / "metrics.jsonl") if name in r}


EVALUATE = PoclTrainer.evaluate


def scores(monkeypatch, values):
    """Evaluations give these ROUGE-Ls (percent) in turn, and then the power is cut."""
    given = list(values)

    def evaluate(self, *args, **kwargs):
        if not given:
            raise RuntimeError("power cut")
        found = type("RougeL", (), {"fmeasure": np.array([given.pop(0) / 100])})
        monkeypatch.setattr("pocl_fast.answers.evaluation.rouge_l", lambda *_, **__: found)
        return EVALUATE(self, *args, **kwargs)

    monkeypatch.setattr(PoclTrainer, "evaluate", evaluate)


def test_a_stage_ends_when_patience_is_over_and_the_next_begins_from_its_best_weights(tmp_path, monkeypatch):
    scores(monkeypatch, [10, 20, 15, 19, 30, 29, 29, 99])
    seen = []
    before_each_batch(
        monkeypatch, lambda n, trainer, s: seen.append((trainer.progress.stage, weights_of(trainer.model)))
    )
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), epochs_per_stage=7, patience=2)
    trainer.train()
    assert [stage for stage, _ in seen] == [0] * 4 + [1] * 6  # 1 and 2 steps a pass
    assert same_bits(seen[4][1], seen[2][1])  # the weights after the second pass, as the third found them
    assert trainer.state.global_step == trainer.state.max_steps == 10
    rates = metrics(tmp_path, "learning_rate")
    assert rates[5] == pytest.approx(1e-4)  # a cosine of its own


def test_a_run_stopped_after_an_early_end_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    setting = {"curriculum": curriculum_of(8, stages=2), "epochs_per_stage": 5, "patience": 1}
    scores(monkeypatch, [10, 5, 20, 30, 40, 50, 60])
    whole = weights_of(train(tmp_path / "whole", **setting))
    scores(monkeypatch, [10, 5])
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", **setting)
    scores(monkeypatch, [20, 30, 40, 50, 60])
    assert same_bits(weights_of(train(tmp_path / "cut", **setting)), whole)


def test_a_continued_optimizer_and_learning_rate_do_not_begin_anew(tmp_path, monkeypatch):
    moments = {}

    def look(number, trainer, samples):
        optimizer = trainer.optimizer.optimizer
        moments[trainer.args.fresh_optimizer, number] = len(optimizer.state)

    for fresh in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            before_each_batch(patch, look)
            kept = {"fresh_optimizer": fresh, "fresh_learning_rate": fresh, "stage_weights": "last", "logging_steps": 1}
            train(tmp_path / str(fresh), curriculum=curriculum_of(8, stages=2), **kept)
    assert moments[True, 2] == 0 < moments[False, 2]
    assert [moments[True, n] > 0 for n in (1, 2, 3)] == [False, False, True]
    rates = [metrics(tmp_path / "False", "learning_rate")[n] for n in (1, 2, 3)]
    assert rates == pytest.approx([1e-4 * (1 + math.cos(math.pi * n / 3)) / 2 for n in range(3)])


def test_temperature_and_alpha_move_within_stages_where_asked(tmp_path, monkeypatch):
    seen = []
    before_each_batch(
        monkeypatch, lambda n, trainer, s: seen.append((trainer.objective.temperature, trainer.objective.alpha))
    )
    curriculum = curriculum_of(8, stages=2, temperatures=[1, 2], alphas=[0.4, 0])
    train(tmp_path, curriculum=curriculum, epochs_per_stage=2, within_stage="linear")
    assert seen == [(1, 0.4), pytest.approx((1.5, 0.2)), *[(2, 0)] * 4]


def test_without_a_curriculum_there_are_as_many_steps_in_one_stage(tmp_path):
    schedule = trainer_of(tmp_path, count=8, kind="none", epochs_per_stage=2, stages=4).planned()
    assert schedule.total_steps == 2 * (1 + 1 + 2 + 2)  # two passes over 2, 4, 6 and 8 samples, in steps of 4
    assert [(stage.size, stage.temperature, stage.alpha) for stage in schedule.stages] == [(8, 1.0, 0.3)]


def test_no_eval_dataset_means_no_evaluation_and_the_last_weights(tmp_path):
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), dev=False)
    trainer.train()
    assert not metrics(tmp_path, "eval_rouge_l")
    assert not list(tmp_path.glob("stage-*-best-*"))
    with pytest.raises(InputError, match='stage_weights="best" needs evaluations'):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), dev=False, stage_weights="best")


def test_a_learning_rate_schedule_that_needs_scores_is_refused(tmp_path):
    with pytest.raises(InputError, match="depends on more than the step"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), lr_scheduler_type="reduce_lr_on_plateau").train()


def test_evaluating_something_else_on_the_way_changes_nothing_of_the_training(tmp_path):
    class Also(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            other = SampleSet(*encoded_samples(2, start=100))
            found.append(trainer.evaluate(other, metric_key_prefix="test"))
            trainer.evaluate(other)

    found = []
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), patience=1, callbacks=[Also()])
    trainer.train()
    assert trainer.state.global_step == 2
    assert "test_rouge_l" in found[0]
    assert {best.step for best in trainer.progress.best.values()} == {2}


def test_losses_and_scores_go_where_report_to_says(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), report_to="tensorboard").train()
    [events] = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    tags = set(EventAccumulator(str(events)).Reload().Tags()["scalars"])
    assert {"train/loss", "train/divergence", "train/temperature", "train/stage", "eval/rouge_l"} <= tags


def test_the_bar_of_a_resumed_training_does_not_count_earlier_steps_as_its_speed(tmp_path):
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append((trainer._flow.bar.n, trainer._flow.bar.initial, trainer._flow.bar.total))

    setting = {"curriculum": curriculum_of(8, stages=2), "callbacks": [Look()]}
    seen = []
    trainer = trainer_of(tmp_path, **setting, max_steps=1)
    trainer.train()
    trainer = trainer_of(tmp_path, **setting)
    trainer.train(resume_from_checkpoint=True)
    assert seen == [(0, 0, 1), (1, 1, 3), (2, 1, 3)]
