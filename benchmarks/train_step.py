"""A distillation step of PoclTrainer is several times faster than TRL's GKD trainer and a plain loop, at the same
losses.

All sides train the same student on the same batches of the same samples under the same objective (forward KL,
temperature 1, no cross-entropy), each in a process of its own, one after the other, in rounds. Prints seconds a step in
the first epoch and in later ones (where ours reads the teacher from its cache), peak memory, and the largest relative
difference of the losses.

    python benchmarks/train_step.py --data dolly.jsonl [--steps 8] [--rounds 2] [--precision fp32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

SIDES = ("ours", "trl", "plain")
EPOCHS = 2
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines of instruction samples")
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="as pocl-fast's option, for every side"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        options.json.write_text(json.dumps(run_side(options)))
        return
    results: dict[str, list[Any]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "result.json"
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--json", str(output)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                results[side].append(json.loads(output.read_text()))
            print(f"round {number + 1}: {side} done", file=sys.stderr, flush=True)
    report(results)


def report(results: dict[str, list[Any]]) -> None:
    """The table, with ratios against our side."""
    middle = {
        side: {
            "first": statistics.median(s for run in runs for s in run["seconds"][0][1:]),
            "later": statistics.median(s for run in runs for s in run["seconds"][1]),
            "peak": statistics.median(run["peak_bytes"] for run in runs),
        }
        for side, runs in results.items()
    }
    print(f"{'':<8}{'s/step, first epoch':>22}{'s/step, later':>18}{'peak GiB':>12}{'loss differs by':>18}")
    ours = results.get("ours")
    for side, row in middle.items():
        gap = "" if ours is None else f"{max_gap(ours[0]['losses'], results[side][0]['losses']):.1e}"
        print(f"{side:<8}{row['first']:>22.3f}{row['later']:>18.3f}{row['peak'] / 2**30:>12.2f}{gap:>18}")
    for side in middle:
        if side != "ours" and ours is not None:
            a, b = middle[side], middle["ours"]
            print(
                f"ours against {side}: first epoch {a['first'] / b['first']:.1f}x,"
                f" later epochs {a['later'] / b['later']:.1f}x faster, peak memory {b['peak'] / a['peak']:.2f}x"
            )


def max_gap(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Trains one side; its seconds a step by epoch, its losses, and the peak of its memory."""
    from pocl_fast import models
    from pocl_fast.samples import SampleEncoder, encode_all, read_samples
    from pocl_fast.student import as_trainable, cut_layers

    device = models.choose_device("auto")
    models.choose_precision(options.precision, device)
    tokenizer = models.load_tokenizer(options.teacher)
    samples = read_samples(options.data)
    encoded, _ = encode_all(
        samples,
        SampleEncoder(tokenizer),
        max_length=512,
        max_prompt_length=384,
        long_prompts="skip",
        name=str(options.data),
    )
    encoded = encoded[: options.steps * options.batch_size]
    teacher = models.load_model(options.teacher, device=device)
    student = as_trainable(cut_layers(teacher, options.student_layers))
    clock = Clock(options.steps)
    train = {"ours": train_ours, "trl": train_trl, "plain": train_plain}[options.side]
    with tempfile.TemporaryDirectory() as folder:
        losses = train(student, teacher, encoded, options, clock, Path(folder), tokenizer)
    return {"seconds": clock.epochs(), "losses": losses, "peak_bytes": clock.peak_bytes}


class Clock:
    """Seconds of each step, and the peak of memory seen at their ends and by the kernel."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self._start = steps, [], 0.0

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
        "num_train_epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
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
    student: Any, teacher: Any, encoded: Any, options: Any, clock: Clock, folder: Path, _: Any
) -> list[float]:
    from transformers import TrainingArguments

    from pocl_fast.objectives import Objective
    from pocl_fast.packing import enable_packing
    from pocl_fast.teacher import Teacher
    from pocl_fast.trainer import PoclTrainer

    for model in (student, teacher):
        enable_packing(model)
    losses: list[float] = []
    trainer = in_file_order(PoclTrainer)(
        model=student,
        args=TrainingArguments(**training_arguments(options, folder)),
        train_dataset=encoded,
        teacher=Teacher(teacher, folder / "cache"),
        objective=Objective("forward_kl"),
        dev=None,
        packed=True,
        callbacks=[timing_callback(clock, losses)],
    )
    trainer.train()
    return losses


def train_trl(
    student: Any, teacher: Any, encoded: Any, options: Any, clock: Clock, folder: Path, tokenizer: Any
) -> list[float]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    losses: list[float] = []
    trainer = in_file_order(GKDTrainer)(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**training_arguments(options, folder), lmbda=0.0, beta=0.0, max_length=512),
        train_dataset=Dataset.from_dict({"index": list(range(len(encoded)))}),
        data_collator=lambda rows: padded([encoded[row["index"]] for row in rows], tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[timing_callback(clock, losses)],
    )
    trainer.train()
    return losses


def train_plain(
    student: Any, teacher: Any, encoded: Any, options: Any, clock: Clock, _: Path, tokenizer: Any
) -> list[float]:
    """What one would write by hand: rectangles padded to the longest, all logits, the teacher at every step."""
    student.train()
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    losses = []
    for _epoch in range(EPOCHS):
        for start in range(0, len(encoded), options.batch_size):
            clock.begin()
            batch = padded(encoded[start : start + options.batch_size], tokenizer.pad_token_id)
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
    return batch | {"prompts": batch["input_ids"][:, :1], "prompt_attention_mask": batch["attention_mask"][:, :1]}


if __name__ == "__main__":
    main()
