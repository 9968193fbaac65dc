"""What goes wrong in a training: values that are not finite, memory and disks that are full, processes killed."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Forked
from tiny_training import before_each_batch, curriculum_of, same_bits, student_model, train, trainer_of, weights_of

from pocl_fast.system.errors import InputError
from pocl_fast.system.seal import damage
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.trainer import PoclTrainer

ONE_STAGE = {"curriculum": curriculum_of(16, stages=1), "learning_rate": 1e-3, "stage_weights": "last"}


def losses(folder):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


# -- values that are not finite


def nan_in(monkeypatch, batch):
    """The loss of this training batch is NaN at one sample's tokens."""

    def damage(number, trainer, samples):
        output = type(trainer.teacher).output

        def said(asked):
            teacher = output(trainer.teacher, asked)
            if number == batch:
                teacher.hidden[: len(asked[0].response_ids)] = float("nan")
            return teacher

        trainer.teacher.output = said

    before_each_batch(monkeypatch, damage)


def test_a_step_with_a_nan_loss_is_skipped_as_if_it_had_not_been(tmp_path, monkeypatch, capsys):
    before = []
    nan_in(monkeypatch, 2)
    look = PoclTrainer.get_batch_samples

    def looked(self, *args):
        before.append(weights_of(self.model))
        return look(self, *args)

    monkeypatch.setattr(PoclTrainer, "get_batch_samples", looked)
    trainer = trainer_of(tmp_path, **ONE_STAGE, on_nonfinite="skip", logging_steps=1)
    trainer.train()
    assert same_bits(before[1], before[2])
    assert not same_bits(before[2], before[3])
    assert all(map(torch.isfinite, map(torch.sum, weights_of(trainer.model).values())))
    said = capsys.readouterr().out
    assert "the loss of sample " in said
    assert "is not finite at stage 1, step 2: the step is skipped (1 so far)" in said
    assert all(torch.tensor(losses(tmp_path)).isfinite())
    assert trainer.state.log_history[-1]["train_loss"] > 0.5 * losses(tmp_path)[0]  # of the steps that were made
    assert next(r["skipped_steps"] for r in read_metrics(tmp_path / "metrics.jsonl") if "skipped_steps" in r) == 1


def test_a_gradient_that_overflows_does_not_reach_the_weights(tmp_path, monkeypatch):
    student = student_model()

    def overflow(number, trainer, samples):
        if number == 2:  # after which the loss still is finite
            trainer.model.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))

    before_each_batch(monkeypatch, overflow)
    with pytest.raises(InputError, match=r"the gradient is not finite \(norm (inf|nan)\) at stage 1, step 2"):
        train(tmp_path, **ONE_STAGE, student=student)
    assert all(map(torch.isfinite, map(torch.sum, weights_of(student).values())))


# -- memory


def no_room_for(monkeypatch, samples):
    """Batches of more than so many samples do not fit; what fails has left a part of its gradient."""
    compute_loss = PoclTrainer.compute_loss
    failed = []

    def limited(self, model, inputs, *args, **kwargs):
        if len(inputs.samples) > samples:
            failed.append(len(inputs.samples))
            next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PoclTrainer, "compute_loss", limited)
    return failed


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_does_not_fit_is_halved_with_the_same_gradient(tmp_path, capsys, accumulation):
    setting = {**ONE_STAGE, "logging_steps": 1, "gradient_accumulation_steps": accumulation}
    whole = train(tmp_path / "whole", **setting)
    with pytest.MonkeyPatch.context() as patch:
        failed = no_room_for(patch, samples=1)
        halved = train(tmp_path / "halved", **setting)
    assert failed == [4, 2]  # once each, not at every step
    said = capsys.readouterr().out
    assert said.count("out of memory with 4 samples: from here on a batch is computed in") == 2
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(halved)[name], value, rtol=0, atol=2e-5)
    for name in ("loss", "ce", "supervised_tokens", "grad_norm"):
        found = [
            [r[name] for r in read_metrics(tmp_path / f / "metrics.jsonl") if "loss" in r] for f in ("whole", "halved")
        ]
        assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_sample_that_alone_does_not_fit_is_an_error_that_names_it(tmp_path, monkeypatch):
    no_room_for(monkeypatch, samples=0)
    with pytest.raises(InputError, match=r"out of memory with sample \d+ alone, of \d+ tokens: give a smaller per_dev"):
        train(tmp_path, **ONE_STAGE)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    def other(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(PoclTrainer, "compute_loss", other)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(tmp_path, **ONE_STAGE)


# -- disks, and files that are read again


def test_a_full_disk_at_a_checkpoint_is_one_clear_error_and_the_one_before_stays(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(number, *_):
        if number == 6:  # files of more than this many bytes cannot be written: the weights have 130 thousand
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))

    before_each_batch(monkeypatch, limit)
    try:
        with pytest.raises(
            InputError, match=r"cannot write checkpoint .*checkpoint-8: .*File too large.*Free some space"
        ):
            train(tmp_path, **ONE_STAGE, epochs_per_stage=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert damage(tmp_path / "checkpoint-4") is None
    assert not (tmp_path / "checkpoint-8").exists()
    assert not (tmp_path / "checkpoint.partial").exists()


def test_a_chosen_checkpoint_that_is_damaged_is_refused(tmp_path):
    train(tmp_path, **ONE_STAGE)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot go on from checkpoint .*checkpoint-4: its optimizer.pt has 0 of \d+"):
        trainer_of(tmp_path, **ONE_STAGE).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_no_pickle_is_read_from_a_run(tmp_path, monkeypatch):
    before_each_batch(monkeypatch, lambda number, *_: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None)
    with pytest.raises(SystemExit):
        train(tmp_path, **ONE_STAGE)
    load, asked = torch.load, []

    def watched(*args, **kwargs):
        asked.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    train(tmp_path, **ONE_STAGE)
    assert len(asked) >= 3  # optimizer, learning rate, random numbers
    assert all(asked)


# -- a process that is killed

SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_training import curriculum_of, train, weights_of
from safetensors.torch import save_file
setting = dict(epochs_per_stage=3, learning_rate=1e-3, save_minutes=1e-9, logging_steps=1)
student = train(Path({folder!r}), curriculum=curriculum_of(24, stages=2), **setting)
save_file(weights_of(student), {folder!r} + "/final.safetensors")
"""


def process_of(folder):
    return Forked(SCRIPT.format(tests=str(Path(__file__).parent.parent), folder=str(folder)))


def trained(folder):
    process = process_of(folder)
    _, said = process.communicate(120)
    assert process.returncode == 0, said


def test_a_process_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path, seed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    trained(whole)
    seconds = time.monotonic() - start
    chance = random.Random(seed)
    kills = 0
    while not (killed / "final.safetensors").exists() and kills < 3:  # wherever that is: a step, a checkpoint, a shard
        process = process_of(killed)
        while process.poll() is None and not (killed / "metrics.jsonl").exists():
            time.sleep(0.01)
        try:
            process.wait(chance.uniform(0.05, 0.4) * seconds if kills else 0.3)
        except TimeoutError:
            process.kill()
        process.wait()
        kills += 1
    trained(killed)
    assert (killed / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    assert compared(killed) == compared(whole)


def compared(folder):
    """The losses and scores of all steps."""
    kept = ("step", "loss", "ce", "divergence", "grad_norm", "learning_rate", "eval_rouge_l", "eval_cross_entropy")
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: r[name] for name in kept if name in r} for r in records]
