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

from train_step_sides import (
    Clock,
    in_epochs,
    train_ours,
    train_plain,
    train_trl,
    train_trl_distillation,
)

SIDES = ("ours", "trl", "plain")
ON_POLICY = ("ours", "trl", "trl-distillation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines of instruction samples")
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="as pocl-fast's option; the other sides' is oneDNN's mode, which without AMX rounds nothing",
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
    from pocl_fast.cutting.cut import cut_layers
    from pocl_fast.data.encoding import SampleEncoder
    from pocl_fast.data.fitting import encode_all
    from pocl_fast.models import loading
    from pocl_fast.models.parameters import as_trainable
    from pocl_fast.models.placement import choose_device
    from pocl_fast.models.precision import choose_precision
    from pocl_fast.records.samples import read_samples

    device = choose_device("auto")
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


if __name__ == "__main__":
    main()
