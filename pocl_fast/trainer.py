"""Training: a transformers Trainer whose loss is the fused distillation loss, run stage by stage along the curriculum.

Knows the optimisation. Does not know how difficulty was measured, or what a run directory holds besides `checkpoints/`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pocl_fast.config import Generation, Training
from pocl_fast.curriculum import Curriculum, Stage
from pocl_fast.errors import InputError
from pocl_fast.evaluation import answer_all, mean_token_cross_entropy
from pocl_fast.heads import lm_head
from pocl_fast.linear_loss import linear_distillation_loss
from pocl_fast.metrics import MetricsLog
from pocl_fast.models import Precision
from pocl_fast.objectives import Objective
from pocl_fast.packing import PackedBatch, model_hidden, pack
from pocl_fast.progress import progress_bar
from pocl_fast.rouge import rouge_l
from pocl_fast.samples import EncodedSample, Sample, SampleEncoder
from pocl_fast.student import num_parameters
from pocl_fast.teacher import Teacher


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has written a checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@dataclass(frozen=True)
class DevSet:
    """Held-out samples, and how the student is asked about them."""

    samples: Sequence[Sample]
    encoded: Sequence[EncodedSample]
    encoder: SampleEncoder
    generation: Generation


class PoclTrainer(Trainer):
    """A `transformers.Trainer` that distils packed samples from a `Teacher` under one `Objective`.

    The train dataset is a list of `EncodedSample`. Evaluation gives greedy ROUGE-L (percent) and cross-entropy (nats a
    token) on the dev set. The loss is the mean over all supervised tokens of a step, gradient accumulation included.
    """

    def __init__(self, *, teacher: Teacher, objective: Objective, dev: DevSet, packed: bool, **kwargs: Any) -> None:
        super().__init__(data_collator=_collate, **kwargs)
        self.remove_callback(PrinterCallback)  # what it prints is in the progress bar and in the logs
        self.teacher, self.dev, self.packed = teacher, dev, packed
        self.objective: Objective = objective
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens, not by its batches
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0
        self._since = time.perf_counter()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The next batches of a step, and their supervised tokens in all."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(len(batch["packed"].labels) for batch in batches), device=device)
        return batches, self.accelerator.gather(tokens).sum() if self.args.world_size > 1 else tokens

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch: PackedBatch = inputs["packed"].to(self.args.device)
        hidden = model_hidden(model, batch, packed=self.packed)
        head = lm_head(self.accelerator.unwrap_model(model))
        out = linear_distillation_loss(
            hidden,
            head.weight,
            self.teacher.output(inputs["samples"]),
            batch.labels,
            self.objective,
            student_bias=head.bias,
            num_items=num_items_in_batch,
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
        )
        self._tokens += batch.input_ids.numel()
        for name, value in {"ce": out.ce, "divergence": out.divergence, **out.metrics}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach() * out.num_tokens  # stays on the device
        self._sums["tokens"] = self._sums.get("tokens", 0) + out.num_tokens
        return (out.loss, {"per_token": out.per_token}) if return_outputs else out.loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training flops of a batch by the usual 6 · parameters · tokens."""
        model: Any = self.model
        return 6 * num_parameters(model) * inputs["packed"].input_ids.numel()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the kernel measured on the way to the training loss: CE, divergence, entropies, agreement,
        tokens/s."""
        if "loss" in logs and self._sums:
            tokens = self._sums.pop("tokens").item()
            logs |= {name: value.item() / max(tokens, 1) for name, value in self._sums.items()}
            now = time.perf_counter()
            logs |= {
                "tokens_per_second": self._tokens / (now - self._since),
                "tokens": self._tokens,
                "supervised_tokens": tokens,
            }
            self._sums, self._tokens, self._since = {}, 0, now
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy ROUGE-L and cross-entropy of the dev set."""
        dev = self.dev
        model: Any = self.model
        start = time.perf_counter()
        model.eval()
        answers = answer_all(
            model,
            dev.encoded,
            dev.encoder,
            max_new_tokens=dev.generation.max_new_tokens,
            batch_size=dev.generation.generation_batch_size,
            temperature=0.0,
            seed=0,
        )
        rouge = rouge_l(answers, [list(dev.samples[sample.index].references) for sample in dev.encoded]).fmeasure
        metrics = {
            f"{metric_key_prefix}_rouge_l": 100 * float(np.mean(rouge)),
            f"{metric_key_prefix}_cross_entropy": mean_token_cross_entropy(model, dev.encoded, packed=self.packed),
            f"{metric_key_prefix}_seconds": time.perf_counter() - start,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - start  # tokens/s is of training alone
        return metrics


def train_stages(
    student: Any,
    teacher: Teacher,
    encoded: Sequence[EncodedSample],
    curriculum: Curriculum,
    dev: DevSet,
    options: Training,
    folder: Path,
    *,
    packed: bool,
    precision: Precision,
) -> None:
    """Trains `student` (in place) through the curriculum's stages, each from the best checkpoint (dev ROUGE-L) of the
    one before.

    `folder` gets `metrics.jsonl` and `checkpoints/stage-i/`; a second call on the same folder goes on from the newest
    checkpoint. Raises `Interrupted` after SIGINT or SIGTERM, once a checkpoint is written.
    """
    by_index = {sample.index: sample for sample in encoded}
    subsets = [[by_index[int(i)] for i in curriculum.subset(stage.index)] for stage in curriculum.stages]
    steps = [_steps(len(subset), options) * options.epochs_per_stage for subset in subsets]
    log = MetricsLog(folder / "metrics.jsonl")
    teacher.cache.reserve(encoded)
    with teacher.cache, progress_bar(sum(steps), "train", "steps") as bar, _Signals() as signals:
        for stage, subset in zip(curriculum.stages, subsets, strict=True):
            checkpoints = folder / "checkpoints" / f"stage-{stage.index}"
            best = checkpoints / "best"
            if best.is_dir():
                _load_weights(student, best)
                bar.update(steps[stage.index])
                continue
            resume = _newest_checkpoint(checkpoints)
            done = int(resume.name.split("-")[1]) if resume else 0
            log.rewind(stage.index, done)
            bar.update(done)
            bar.set_postfix_str(f"stage {stage.index + 1}/{len(curriculum.stages)}")
            trainer = PoclTrainer(
                model=student,
                args=_arguments(options, checkpoints, precision, stage),
                train_dataset=subset,
                eval_dataset=list(dev.encoded),
                teacher=teacher,
                objective=Objective(
                    divergence=options.divergence,
                    beta=options.beta,
                    skew=options.skew,
                    temperature=stage.temperature,
                    alpha=stage.alpha,
                    temperature_scaling=options.temperature_scaling,
                ),
                dev=dev,
                packed=packed,
                callbacks=[
                    _Watch(stage, len(curriculum.stages), log, bar, signals, teacher, encoded, options.save_minutes)
                ],
            )
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            if signals.received:
                raise Interrupted(signals.received)
            _finish_stage(student, checkpoints, best)


def _collate(samples: list[EncodedSample]) -> dict[str, Any]:
    return {"packed": pack(samples), "samples": samples}


def _steps(samples: int, options: Training) -> int:
    """Optimizer steps an epoch."""
    batches = -(-samples // options.batch_size)
    return -(-batches // options.gradient_accumulation_steps)


def _arguments(options: Training, folder: Path, precision: Precision, stage: Stage) -> TrainingArguments:
    on_gpu = precision.device.type == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_train_epochs=options.epochs_per_stage,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch_fused",
        bf16=on_gpu and precision.name == "bf16",
        use_cpu=not on_gpu,
        logging_strategy="steps",
        logging_steps=5,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # transformers would log an average in a NaN's place, and train on
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rouge_l",
        greater_is_better=True,
        seed=options.seed + stage.index,
        data_seed=options.seed + stage.index,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


def _finish_stage(student: Any, checkpoints: Path, best: Path) -> None:
    """Keeps the stage's best weights (already loaded into `student`) and drops the optimizer states."""
    partial = checkpoints / "best.partial"
    shutil.rmtree(partial, ignore_errors=True)
    student.save_pretrained(partial)
    os.replace(partial, best)
    for old in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(old, ignore_errors=True)


def _load_weights(student: Any, folder: Path) -> None:
    from safetensors.torch import load_model

    load_model(student, folder / "model.safetensors", strict=False)  # a tied lm_head is stored once
    student.tie_weights()


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole."""
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))):
        if _is_whole(Path(newest)):
            return Path(newest)
        print(f"checkpoint {newest} is incomplete and is left out", flush=True)
        shutil.rmtree(newest)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are all there and none is cut off."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # the last to be written
        for weights in checkpoint.glob("*.safetensors"):
            safe_open(weights, framework="pt")  # compares the header with the file's length
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for path in checkpoint.glob("*.pt"))  # a zip's directory is at its end


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying from them, so that the step in progress ends and is saved. A second one
    kills."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's own business
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        tqdm.write("stopping after this step, a checkpoint is being written (again to stop at once)")


class _Watch(TrainerCallback):
    """Progress, metrics.jsonl, timed checkpoints, orderly stops, and the release of the teacher's body."""

    def __init__(
        self,
        stage: Stage,
        num_stages: int,
        log: MetricsLog,
        bar: tqdm,
        signals: _Signals,
        teacher: Teacher,
        all_samples: Sequence[EncodedSample],
        save_minutes: float,
    ) -> None:
        self.stage, self.num_stages, self.log, self.bar = stage, num_stages, log, bar
        self.signals, self.teacher, self.all_samples = signals, teacher, all_samples
        self.save_seconds, self.saved = 60 * save_minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)
        if self.signals.received:
            control.should_training_stop = True
        if self._ends_an_epoch(args, state):
            return  # its evaluation comes first, then its checkpoint
        if self.signals.received or time.monotonic() - self.saved > self.save_seconds:
            control.should_log = control.should_save = True  # the log stops at a NaN, before it is saved
        if self.signals.received:
            args.load_best_model_at_end = False

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved = time.monotonic()
        self.teacher.cache.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.teacher.release_body_if_cached(self.all_samples)
        if not self._ends_an_epoch(args, state):  # stopped within it
            control.should_evaluate = False

    @staticmethod
    def _ends_an_epoch(args: Any, state: Any) -> bool:
        return state.global_step % (state.max_steps // args.num_train_epochs) == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and "eval_rouge_l" not in logs:
            return
        loss = logs["loss"] if "loss" in logs else logs["eval_cross_entropy"]
        if not np.isfinite(loss):
            what = "the loss" if "loss" in logs else "the dev cross-entropy"
            raise InputError(
                f"{what} is {loss} at stage {self.stage.index + 1}, step {state.global_step}: look for damaged weights"
                f" in the models, or give a lower --learning-rate (now {args.learning_rate}) with --restart"
            )
        place = {"stage": self.stage.index, "step": state.global_step, "epoch": state.epoch}
        setting = {"temperature": self.stage.temperature, "alpha": self.stage.alpha}
        self.log.write({**place, **setting, **logs})
        where = f"stage {self.stage.index + 1}/{self.num_stages} epoch {state.epoch:.2f}"
        if "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, ce {logs['ce']:.3f}, kd {logs['divergence']:.3f},"
                f" {logs['tokens_per_second']:.0f} tok/s, {where}",
                refresh=sys.stderr.isatty(),  # in a log file the bar's own rhythm, a line every 15 s, is enough
            )
        else:
            tqdm.write(
                f"{where}: temperature {self.stage.temperature:g}, alpha {self.stage.alpha:g}:"
                f" dev ROUGE-L {logs['eval_rouge_l']:.2f}, dev cross-entropy {logs['eval_cross_entropy']:.3f}"
            )
