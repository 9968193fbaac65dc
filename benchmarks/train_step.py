"""A distillation step of PoclTrainer is several times faster than TRL's trainers and a plain loop, at the same losses.

All sides train the same student on the same batches of the same samples under the same objective (forward KL,
temperature 1, no cross-entropy), each in a process of its own, one after the other, in rounds. Prints seconds a step in
the first epoch and in later ones (where ours reads the teacher from its cache), supervised tokens a second, peak
memory, the share of our steps that is neither model nor loss nor optimizer, and the losses side by side.

With --on-policy every response is the student's own (reverse KL, 32 new tokens at most), against TRL's GKD and
distillation trainers; losses differ there, for the samples do.

With --whole-schedule the paper's four stages of eight passes on all of the samples: measuring and ranking are run,
steps are those timed above times their numbers; the plain loop's passes are all alike.

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
ON_POLICY = ("ours", "trl", "trl-distillation")
NEW_TOKENS = 32
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
    parser.add_argument("--sides", nargs="+", choices=(*SIDES, "trl-distillation"))
    parser.add_argument("--on-policy", action="store_true")
    parser.add_argument("--whole-schedule", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        options.json.write_text(json.dumps(run_side(options)))
        return
    options.sides = options.sides or list(ON_POLICY if options.on_policy else SIDES)
    results: dict[str, list[Any]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "result.json"
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--json", str(output)]
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
                results[side].append(json.loads(output.read_text()))
            print(f"round {number + 1}: {side} done", file=sys.stderr, flush=True)
    middle = report(results, options)
    if options.whole_schedule:
        whole_schedule(middle, options)


def report(results: dict[str, list[Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The table, with ratios against our side."""
    middle = {
        side: {
            "first": statistics.median(s for run in runs for s in run["seconds"][0][1:]),
            "later": statistics.median(s for run in runs for s in run["seconds"][1]),
            "peak": statistics.median(run["peak_bytes"] for run in runs),
            "tokens": runs[0]["tokens"] / options.steps,  # supervised, a step
        }
        for side, runs in results.items()
    }
    columns = ("", "s/step, first epoch", "later", "supervised tok/s, later", "peak GiB", "loss differs by")
    print("".join(f"{name:>{len(name) + 3 if name else 18}}" for name in columns))
    ours = results.get("ours")
    for side, row in middle.items():
        same = ours is not None and not options.on_policy
        gap = f"{max_gap(ours[0]['losses'], results[side][0]['losses']):.1e}" if same and ours else ""
        cells = (row["first"], row["later"], row["tokens"] / row["later"], row["peak"] / 2**30)
        values = [f"{cells[0]:.3f}", f"{cells[1]:.3f}", f"{cells[2]:.0f}", f"{cells[3]:.2f}", gap]
        widths = [len(name) + 3 for name in columns[1:]]
        print(f"{side:>18}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True)))
    for side in middle:
        if side != "ours" and ours is not None:
            a, b = middle[side], middle["ours"]
            print(
                f"ours against {side}: first epoch {a['first'] / b['first']:.1f}x,"
                f" later epochs {a['later'] / b['later']:.1f}x faster, peak memory {b['peak'] / a['peak']:.2f}x"
            )
    if ours is not None:
        shares = [share for run in ours for share in run["outside"]]
        print(f"ours: {100 * statistics.median(shares):.1f} % of a step is outside of model, loss and optimizer")
    if not options.on_policy:
        print("losses, step by step: " + ", ".join(results))
        for number, row in enumerate(zip(*(runs[0]["losses"] for runs in results.values()), strict=True)):
            print(f"{number + 1:>4}  " + "  ".join(f"{loss:.6f}" for loss in row))
    return middle


def max_gap(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def whole_schedule(middle: dict[str, Any], options: argparse.Namespace) -> None:
    """The paper's run on all samples of the file, from what was timed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        common = ["--output", folder + "/run", "--teacher", options.teacher, "--long-prompts", "skip"]
        common += ["--student-layers", str(options.student_layers), "--train", str(options.data)]
        for step in (["measure", *common, "--precision", options.precision], ["rank", "--output", folder + "/run"]):
            command = [sys.executable, "-m", "pocl_fast.cli", *step]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        measured = time.perf_counter() - start
        from pocl_fast.curriculum.stages import Curriculum

        sizes = [stage.size for stage in Curriculum.load(folder + "/run/curriculum.json").stages]
    steps = [-(-size // options.batch_size) for size in sizes]
    first = steps[-1]  # the teacher runs once a sample
    ours = measured + first * middle["ours"]["first"] + (8 * sum(steps) - first) * middle["ours"]["later"]
    print(f"whole schedule, {sizes[-1]} samples, {8 * sum(steps)} steps; measuring and ranking took {measured:.0f} s")
    for side, row in middle.items():
        seconds = ours if side == "ours" else 8 * sum(steps) * statistics.mean((row["first"], row["later"]))
        print(f"{side:>18}: {seconds:.0f} s, {seconds / ours:.1f}x ours")


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Trains one side; its seconds a step by epoch, its losses, and the peak of its memory."""
    from pocl_fast.data.encoding import SampleEncoder, encode_all
    from pocl_fast.data.records import read_samples
    from pocl_fast.models import loading
    from pocl_fast.models.cut import as_trainable, cut_layers
    from pocl_fast.models.precision import choose_precision

    device = loading.choose_device("auto")
    if options.precision == "bf16":  # for every side; in fp32 the others' products are torch's own
        choose_precision(options.precision, device)
    tokenizer = loading.load_tokenizer(options.teacher)
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
    batches = in_epochs(encoded, options)
    teacher = loading.load_model(options.teacher, device=device)
    student = as_trainable(cut_layers(teacher, options.student_layers))
    clock = Clock(options.steps)
    if options.side == "ours":
        teacher = options.teacher  # by its name, so that it keeps one copy of the teacher's weights
    sides = {"ours": train_ours, "trl": train_trl, "trl-distillation": train_trl_distillation, "plain": train_plain}
    with tempfile.TemporaryDirectory() as folder:
        losses = sides[options.side](student, teacher, batches, options, clock, Path(folder), tokenizer)
    return {
        "seconds": clock.epochs(),
        "losses": losses,
        "peak_bytes": clock.peak_bytes,
        "outside": clock.outside,
        "tokens": sum(len(sample.response_ids) for sample in encoded),
    }


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
    from pocl_fast.data.records import read_samples

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


if __name__ == "__main__":
    main()
