"""The sides that train_step.py times on the same batches: PoclTrainer, TRL's two trainers and a plain loop."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import psutil
import torch

NEW_TOKENS = 32
EPOCHS = 2
LEARNING_RATE = 1e-4


def schedule_of(encoded: Any, options: argparse.Namespace) -> Any:
    """One stage of all samples, in our trainer's own order."""
    from pocl_fast.curriculum.schedule import BatchSize, Schedule

    lengths = {sample.index: len(sample) for sample in encoded}
    return Schedule(curriculum_of(encoded), lengths, BatchSize(options.batch_size), seed=42, epochs=EPOCHS)


def curriculum_of(encoded: Any) -> Any:
    from dataclasses import replace

    import numpy as np

    from pocl_fast.curriculum.stages import no_curriculum

    plain = no_curriculum(len(encoded), temperature=1.0, alpha=0.0)
    return replace(plain, order=np.array([sample.index for sample in encoded]))


def in_epochs(encoded: Any, options: argparse.Namespace) -> list[Any]:
    """The batches of all steps, the same for every side."""
    schedule, known = schedule_of(encoded, options), {sample.index: sample for sample in encoded}
    return [[known[i] for i in schedule.batch(step, 0)] for step in range(schedule.total_steps)]


class Clock:
    """Seconds of each step, and the peak of memory seen at their ends and by the kernel."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self._start = steps, [], 0.0
        self.outside: list[float] = []  # shares of steps

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def epochs(self) -> list[list[float]]:
        return [self.seconds[: self.steps], self.seconds[self.steps :]]

    @property
    def peak_bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        info = psutil.Process().memory_info()
        status = Path("/proc/self/status")
        if status.exists():
            return (
                int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
                * 1024
            )
        return info.rss


def training_arguments(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def timing_callback(clock: Clock, losses: list[float]) -> Any:
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    return Timing()


def in_file_order(trainer: type) -> type:
    """The trainer with a sequential sampler, so that every side sees the same batches."""

    class InFileOrder(trainer):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InFileOrder


def train_ours(
    student: Any, teacher: Any, batches: Any, options: argparse.Namespace, clock: Clock, folder: Path, tokenizer: Any
) -> list[float]:
    from pocl_fast import PoclConfig, PoclTrainer, SampleSet

    encoded = sorted({s.index: s for batch in batches for s in batch}.values(), key=lambda s: s.index)
    objective = {"rollouts": "gkd", "lmbda": 1.0, "divergence": "reverse_kl"} if options.on_policy else {}
    losses: list[float] = []
    trainer = PoclTrainer(
        student,
        teacher,
        PoclConfig(
            **training_arguments(options, folder),
            **objective,
            epochs_per_stage=EPOCHS,
            precision=options.precision,
            max_new_tokens=NEW_TOKENS,
        ),
        SampleSet(read_all(options), encoded),
        processing_class=tokenizer,
        curriculum=curriculum_of(encoded),
        callbacks=[timing_callback(clock, losses)],
    )
    watch_outside(trainer, clock)
    trainer.train()
    return losses


def read_all(options: argparse.Namespace) -> Any:
    from pocl_fast.records.samples import read_samples

    return read_samples(options.data)


def watch_outside(trainer: Any, clock: Clock) -> None:
    """Notes the share of each step that passed outside of its batches' losses and the optimizer."""
    inside = [0.0]

    def timed(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside[0] += time.perf_counter() - start

        return run

    trainer.training_step = timed(trainer.training_step)
    trainer._clip_grad_norm = timed(trainer._clip_grad_norm)
    create, fetch, last = trainer.create_optimizer, trainer.get_batch_samples, [time.perf_counter()]

    def create_optimizer(*args: Any) -> Any:
        optimizer, begun = create(*args), [0.0]
        optimizer.register_step_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
        optimizer.register_step_post_hook(lambda *_: inside.__setitem__(0, inside[0] + time.perf_counter() - begun[0]))
        return optimizer

    def get_batch_samples(*args: Any) -> Any:  # from one fetching to the next is a step
        now = time.perf_counter()
        if inside[0]:
            clock.outside.append(1 - inside[0] / (now - last[0]))
        inside[0], last[0] = 0.0, now
        return fetch(*args)

    trainer.create_optimizer, trainer.get_batch_samples = create_optimizer, get_batch_samples


def train_trl(
    student: Any, teacher: Any, batches: Any, options: argparse.Namespace, clock: Clock, folder: Path, tokenizer: Any
) -> list[float]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    everything = [sample for batch in batches for sample in batch]
    objective = {"lmbda": 1.0, "beta": 1.0} if options.on_policy else {"lmbda": 0.0, "beta": 0.0}
    losses: list[float] = []
    trainer = in_file_order(GKDTrainer)(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            **training_arguments(options, folder),
            **objective,
            num_train_epochs=1,
            remove_unused_columns=False,
            max_length=512,
            max_new_tokens=NEW_TOKENS,
            temperature=1.0,
        ),
        train_dataset=Dataset.from_dict({"index": list(range(len(everything)))}),
        data_collator=lambda rows: padded([everything[row["index"]] for row in rows], tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[timing_callback(clock, losses)],
    )
    trainer.train()
    return losses


def train_trl_distillation(
    student: Any, teacher: Any, batches: Any, options: argparse.Namespace, clock: Clock, folder: Path, tokenizer: Any
) -> list[float]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    samples = read_all(options)
    prompts = [list(samples[sample.index].messages) for batch in batches for sample in batch]
    losses: list[float] = []
    trainer = in_file_order(DistillationTrainer)(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            **training_arguments(options, folder), num_train_epochs=1, max_completion_length=NEW_TOKENS, beta=1.0
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[timing_callback(clock, losses)],
    )
    trainer.train()
    return losses


def train_plain(
    student: Any, teacher: Any, batches: Any, options: argparse.Namespace, clock: Clock, _: Path, tokenizer: Any
) -> list[float]:
    """What one would write by hand: rectangles padded to the longest, all logits, the teacher at every step."""
    student.train()
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    losses = []
    for samples in batches:
        clock.begin()
        batch = padded(samples, tokenizer.pad_token_id)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits[:, :-1]
        log_q = torch.log_softmax(student(**inputs).logits[:, :-1], -1)
        log_p = torch.log_softmax(teacher_logits, -1)
        per_token = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        mask = batch["labels"][:, 1:].to(device) != -100
        loss = (per_token * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.end()
    return losses


def padded(samples: Any, pad_id: int) -> dict[str, torch.Tensor]:
    """A right-padded rectangle with labels on the responses, and the prompts that TRL's trainer looks at."""
    longest = max(map(len, samples))
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        fill = longest - len(sample)
        columns["input_ids"].append([*sample.prompt_ids, *sample.response_ids, *[pad_id] * fill])
        columns["attention_mask"].append([1] * len(sample) + [0] * fill)
        columns["labels"].append([-100] * len(sample.prompt_ids) + list(sample.response_ids) + [-100] * fill)
    batch = {name: torch.tensor(rows) for name, rows in columns.items()}
    prompts = [list(sample.prompt_ids) for sample in samples]
    longest = max(map(len, prompts))  # padded on the left, as for generation
    batch["prompts"] = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    batch["prompt_attention_mask"] = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return batch
