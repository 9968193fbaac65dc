"""Stopped at any point, training goes on to the same bits; so does what a crash has left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import options, run, weights
from tiny_training import before_each_batch, curriculum_of, same_bits, train, trainer_of, weights_of

from pocl_fast.answers import engine
from pocl_fast.system.errors import InputError, Interrupted
from pocl_fast.system.seal import SEAL, damage, seal
from pocl_fast.training import checkpoints, saving_trainer
from pocl_fast.training.metrics import MetricsLog, read_metrics
from pocl_fast.training.state import TrainingState
from pocl_fast.training.trainer import PoclTrainer

TWO_STAGES = {"curriculum": curriculum_of(24, stages=2), "epochs_per_stage": 2, "learning_rate": 1e-3}  # 6 + 12 steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return weights_of(train(folder, **TWO_STAGES)), metrics(folder)


def metrics(folder):
    """The evaluations, without their times."""
    kept = ("stage", "step", "temperature", "eval_rouge_l", "eval_cross_entropy")
    return [{k: r[k] for k in kept} for r in read_metrics(folder / "metrics.jsonl") if "eval_rouge_l" in r]


def power_cut(*_):
    raise RuntimeError("power cut")


def interrupt_at(monkeypatch, batch):
    """Sends this process SIGINT before its `batch`-th training batch."""

    def kill(number, *_):
        if number == batch:
            os.kill(os.getpid(), signal.SIGINT)

    before_each_batch(monkeypatch, kill)


# Of the 18 steps: the first; within an epoch; an epoch's last; a stage's last; the next stage's first; within its
# second epoch; the very last.
@pytest.mark.parametrize("batch", [1, 2, 3, 6, 7, 14, 18])
def test_a_training_interrupted_anywhere_ends_with_the_bits_of_one_that_was_not(tmp_path, uninterrupted, batch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, batch)
        with pytest.raises(Interrupted) as stop:
            train(tmp_path, **TWO_STAGES)
    assert str(stop.value) == "stopped by SIGINT"
    assert stop.value.code == 130
    with pytest.MonkeyPatch.context() as patch:
        redone = []
        before_each_batch(patch, lambda number, *_: redone.append(number))
        student = train(tmp_path, **TWO_STAGES)
    assert len(redone) == 18 - batch
    assert same_bits(weights_of(student), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    def kill(number, *_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_each_batch(monkeypatch, kill)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, **TWO_STAGES)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_during_the_last_evaluation_of_a_stage_is_heeded(tmp_path, uninterrupted):
    evaluate, count = PoclTrainer.evaluate, []

    def signalled(self, *args, **kwargs):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoclTrainer, "evaluate", signalled)
        with pytest.raises(Interrupted):
            train(tmp_path, **TWO_STAGES)
    assert same_bits(weights_of(train(tmp_path, **TWO_STAGES)), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


def test_a_crash_in_an_epochs_evaluation_does_not_lose_the_evaluation(tmp_path, uninterrupted):
    evaluate, count = PoclTrainer.evaluate, []

    def crash(self, *args, **kwargs):
        count.append(1)
        return power_cut() if len(count) == 2 else evaluate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoclTrainer, "evaluate", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path, **TWO_STAGES, save_minutes=1e-6)
    assert same_bits(weights_of(train(tmp_path, **TWO_STAGES)), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("method", ["_load_weights", "_forget_optimizer_state"])
def test_a_crash_while_a_stage_begins_loses_nothing(tmp_path, uninterrupted, method):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoclTrainer, method, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path, **TWO_STAGES)
    assert same_bits(weights_of(train(tmp_path, **TWO_STAGES)), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, uninterrupted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving_trainer, "seal", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path, **TWO_STAGES)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.MonkeyPatch.context() as patch:
        count = []
        patch.setattr(saving_trainer, "seal", lambda *a: power_cut() if count else count.append(seal(*a)))
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path, **TWO_STAGES)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert same_bits(weights_of(train(tmp_path, **TWO_STAGES)), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


def cut(name):
    def damage(checkpoint):
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def flipped(name):
    def damage(checkpoint):
        path = checkpoint / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))

    return damage


def without(name):
    return lambda checkpoint: (checkpoint / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        cut("model.safetensors"),
        flipped("optimizer.pt"),
        cut("trainer_state.json"),
        without("pocl_state.json"),
        without(SEAL),
    ],
    ids=["weights", "optimizer", "state", "no-state", "no-seal"],
)
def test_a_newest_checkpoint_cut_off_by_a_crash_is_left_out(tmp_path, capsys, uninterrupted, damage):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            train(tmp_path, **TWO_STAGES)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    damage(tmp_path / "checkpoint-5")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": 0, "st')
    student = train(tmp_path, **TWO_STAGES)
    assert "checkpoint-5 is left out and renamed to checkpoint-5.damaged: " in capsys.readouterr().out
    assert same_bits(weights_of(student), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


def test_a_start_beside_checkpoints_of_an_earlier_training_is_refused(tmp_path):
    train(tmp_path, **TWO_STAGES)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="holds checkpoint-12, checkpoint-18 of an earlier training"):
        trainer_of(tmp_path, **TWO_STAGES).train()
    with pytest.raises(InputError, match="holds checkpoint-18 of an earlier training"):
        trainer_of(tmp_path, **TWO_STAGES).train(str(tmp_path / "checkpoint-12"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 2}, "samples of a micro-batch: 4 there, 2 here"),
        ({"gradient_accumulation_steps": 2}, "ranks x accumulated micro-batches: 1 there, 2 here"),
        ({"epochs_per_stage": 3}, "epochs of a stage: 2 there, 3 here"),
        ({"seed": 5}, "seed of the order: 42 there, 5 here"),
        ({"curriculum": curriculum_of(24, stages=3)}, "samples of the stages"),
    ],
)
def test_going_on_with_another_schedule_is_refused(tmp_path, monkeypatch, changes, message):
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(tmp_path, **TWO_STAGES)
    with pytest.raises(InputError, match=f"checkpoint-5 is of another schedule .{message}"):
        train(tmp_path, **(TWO_STAGES | changes))


def test_an_interrupted_trainer_can_go_on_itself(tmp_path, monkeypatch, uninterrupted):
    interrupt_at(monkeypatch, 5)
    trainer = trainer_of(tmp_path, **TWO_STAGES)
    with pytest.raises(Interrupted):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert same_bits(weights_of(trainer.model), uninterrupted[0])


def test_the_best_weights_that_an_older_checkpoint_names_stay_with_it(tmp_path, monkeypatch):
    given = iter([0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr(
        "pocl_fast.answers.evaluation.rouge_l",
        lambda *_, **__: type("RougeL", (), {"fmeasure": np.array([next(given)])}),
    )
    train(tmp_path, **TWO_STAGES)
    older = TrainingState.read(tmp_path / "checkpoint-12" / "pocl_state.json")
    assert {checkpoints.best_path(tmp_path, stage, best.step).name for stage, best in older.best.items()} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_metrics_are_rewound_to_the_very_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 3, 4):
        log.write({"step": step})
    log.rewind(2)
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 2]


def test_checkpoints_are_also_written_by_the_clock(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        before_each_batch(patch, lambda number, *_: power_cut() if number == 6 else None)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path, **TWO_STAGES, save_minutes=1e-6)
    assert (tmp_path / "checkpoint-5").is_dir()


@pytest.mark.parametrize("signal_number", [pytest.param(signal.SIGINT, marks=pytest.mark.full), signal.SIGTERM])
def test_a_signalled_command_leaves_a_whole_checkpoint_and_goes_on_to_the_same_student(
    finished, tmp_path, signal_number
):
    inputs, _ = finished
    words = options(inputs, epochs_per_stage=5, stages=2, generation_batch_size=4)
    output, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "pocl_fast.cli", "distill", "--output", str(output), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal_number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal_number
    assert f"stopped by {signal_number.name}; run the same command to resume" in said
    assert "Traceback" not in said
    newest = checkpoints.checkpoints(output / "checkpoints")[-1]
    assert damage(newest) is None
    state = json.loads((newest / "trainer_state.json").read_text())
    assert 1 <= state["global_step"] == checkpoints.step_of(newest) < 45
    assert not (output / "student").exists()
    assert run("distill", output, *words) == 0
    if not (shared := inputs / "whole").exists():  # both signals are compared with one run
        assert run("distill", whole, *words) == 0
        shutil.copytree(whole, shared)
    assert weights(output) == weights(shared)


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_training_stops_with_a_message(
    finished, tmp_path, capsys, monkeypatch, signal_number, status
):
    def signalled(*_, **__):
        os.kill(os.getpid(), signal_number)
        time.sleep(1)

    monkeypatch.setattr(engine, "generate", signalled)
    assert run("distill", tmp_path / "out", *options(finished[0])) == status
    assert "stopped; run the same command to resume" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["measure"]["done"] is False
