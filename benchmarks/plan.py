"""`pocl-fast plan` says a run's optimizer steps exactly, its teacher's cache within 1 % and its memory within 20 %.

The duration that `--time` says is printed too: it holds where the machine does nothing else.

Plans a run, then does it, each in a process of its own; prints what was said beside what came, step by step. Memory is
the peak that `steps.json` has of each step, in which the process keeps what was freed of the steps before.

    python benchmarks/plan.py --train dolly.jsonl [--teacher bundled] [--student-layers 6] [--samples 160] [--dev 32]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="JSON Lines of instruction samples")
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--student-layers", default="6")
    parser.add_argument("--samples", type=int, default=160, help="of the file's first records")
    parser.add_argument("--dev", type=int, default=32, help="of the records after them")
    options, others = parser.parse_known_args()  # other options are the run's
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [*inputs(options, folder), *others]
        planned = json.loads(said("plan", *words, "--time", "--json"))
        said("distill", *words, "--output", str(folder / "run"))
        compare(planned, folder / "run")


def inputs(options: argparse.Namespace, folder: Path) -> list[str]:
    """The options of both sides, with the records of the file in two."""
    with open(options.train, encoding="utf-8") as file:
        lines = list(itertools.islice(file, options.samples + options.dev))
    for name, part in (("train", lines[: options.samples]), ("dev", lines[options.samples :])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return [
        *("--train", str(folder / "train.jsonl"), "--dev", str(folder / "dev.jsonl"), "--teacher", options.teacher),
        *("--student-layers", options.student_layers, "--long-prompts", "skip"),
        *("--stages", "2", "--epochs-per-stage", "2", "--max-new-tokens", "48", "--eval-seeds", "10", "20"),
    ]


def said(*words: str) -> str:
    """What a command prints."""
    made = subprocess.run([sys.executable, "-m", "pocl_fast.cli", *words], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"pocl-fast {' '.join(words)}\n{made.stdout}{made.stderr}")
    return made.stdout


def compare(planned: dict[str, Any], run: Path) -> None:
    stamps = json.loads((run / "steps.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shards = list((run / "teacher_cache").rglob("shard-*.safetensors"))
    line("optimizer steps", planned["steps"]["steps"], max(record["step"] for record in metrics))
    line("teacher's cache, MiB", planned["disk"]["cache"] / MIB, sum(one.stat().st_size for one in shards) / MIB)
    said_of = {one["step"]: one["total"] / MIB for one in planned["memory"]["steps"]}
    peak = {name: stamp["peak_bytes"] / MIB for name, stamp in stamps.items()}
    line("memory, MiB: measure", said_of["measure, evaluate"], peak["measure"])
    line("memory, MiB: train", max(said_of.values()), peak["train"])
    times = {one["step"]: one["seconds"] for one in planned["times"]}
    for name in ("measure", "evaluate before", "evaluate after"):
        line(f"seconds: {name}", times[name], stamps[name.replace(" ", "-")]["seconds"])
    parts = ("the teacher's cache", "train", "evaluate in training")
    line("seconds: train", sum(times[part] for part in parts), stamps["train"]["seconds"])
    line("seconds in all", sum(times.values()), sum(stamp["seconds"] for stamp in stamps.values()))


def line(what: str, planned: float, came: float) -> None:
    print(f"{what:<28}{planned:>12,.1f} planned{came:>12,.1f} came{100 * (planned / came - 1):>+8.1f} %", flush=True)


if __name__ == "__main__":
    main()
