"""What the curriculum is worth: objectives with POCL, with a random order and without, at equal optimizer steps.

A teacher is cut to a student, which is fine-tuned on the references for one pass, so that difficulty means something.
From there each method of study_cells.py is trained with each seed, and its student scored on held-out samples: greedy
ROUGE-L and cross-entropy. The methods of a part have equally many steps of equally many samples.

    python benchmarks/study.py --output FOLDER [--data FOLDER] [--parts main parts pacing budgets] [--seeds 1 2 3]

--data is a folder with dolly_500.jsonl (to train on, and held out) and sni_3_6.jsonl (held out); without it the
samples of `make demo`. Interrupt it at any point: the same command goes on, and what was computed is kept. Two
processes train, each on one core, or as many as --processes says. docs/study.md is written by study_report.py from its
folder.

At its default size it has 147 trainings with 7,584 steps of 8 samples: 2.7 hours on two cores in fp32, estimated from
2.2 processor-seconds a step, 8 s a scoring, and half an hour of a core for what the student and the teacher generate;
two thirds of that with --precision bf16 on a processor that multiplies it. The samples of --data have half as many
tokens again: with --train-samples 96 --budget-samples 32 it is about 3 hours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study_cells import PARTS, Method

from pocl_fast.system.files import write_json

SETTINGS, RESULT = "settings.json", "result.json"
HELD_OUT_OF_DOLLY = 100
GENERATED = 32  # tokens of an answer
PASSES_OF_ONE = 2.5  # over all samples, of four stages of one pass


@dataclass(frozen=True)
class Setup:
    """All that decides the study's figures besides its methods."""

    data: str | None
    teacher: str
    train_samples: int
    budget_samples: int
    student_layers: int
    passes: float
    batch_size: int
    learning_rate: float
    max_length: int
    max_prompt_length: int
    precision: str = "fp32"

    def options(self, seed: int) -> dict[str, Any]:
        """Options of every training."""
        return {
            "device": "cpu", "precision": self.precision, "seed": seed, "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate, "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length, "long_prompts": "skip", "max_new_tokens": GENERATED,
            "generation_batch_size": 128, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1_000_000, "save_minutes": 1e6,
        }  # fmt: skip

    def epochs(self, method: Method) -> int:
        """Passes of each of four stages: of one pass a stage are 2.5 over all samples."""
        return max(1, round((method.passes or self.passes) / PASSES_OF_ONE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with dolly_500.jsonl and sni_3_6.jsonl")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", help="only methods whose name begins so")
    parser.add_argument("--train-samples", type=int, default=160)
    parser.add_argument("--budget-samples", type=int, default=48, help="of the part `budgets`")
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--passes", type=float, default=2.5, help="over all samples")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of every training")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--list", action="store_true", help="print the trainings and what is done of them")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    limits = (128, 80) if given.data else (160, 112)
    setup = Setup(
        None if given.data is None else str(given.data.resolve()), given.teacher, given.train_samples,
        given.budget_samples,
        given.student_layers, given.passes, given.batch_size, given.learning_rate, *limits, given.precision,
    )  # fmt: skip
    check_setup(given.output, setup)
    wanted = cells(given.parts, given.seeds, given.methods)
    if given.list:
        for method, seed in wanted:
            done = (cell_folder(given.output, method, seed) / RESULT).exists()
            print(f"{'done' if done else '    '}  {method.part:<10} {method.name:<45} seed {seed}")
        return
    if given.worker is not None:
        work(given.output, setup, wanted, given.worker)
        return
    prepare(given.output)
    run_workers(given.output, given.processes, wanted)


def read_setup(output: Path) -> Setup:
    """The setup of a folder."""
    return Setup(**json.loads((output / SETTINGS).read_text(encoding="utf-8")))


def check_setup(output: Path, setup: Setup) -> None:
    """Records the setup in the folder. Raises SystemExit where it holds a study of another one."""
    if setup.passes % PASSES_OF_ONE:
        raise SystemExit(f"--passes {setup.passes:g}: four stages of n passes each are {PASSES_OF_ONE:g} n over all")
    path, now = output / SETTINGS, asdict(setup)
    if path.exists():
        before = asdict(read_setup(output))
        if changed := [
            f"{name}: was {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]
        ]:
            raise SystemExit(f"{output} holds another study ({'; '.join(changed)}): give another --output")
        return
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def cells(parts: list[str], seeds: list[int], words: list[str] | None) -> list[tuple[Method, int]]:
    """The trainings, seed by seed, so that a study that is stopped has whole seeds of what comes first."""
    methods = [method for part in parts for method in PARTS[part]()]
    if words:
        methods = [method for method in methods if any(method.name.startswith(word) for word in words)]
    return [(method, seed) for part in parts for seed in seeds for method in methods if in_part(method, part)]


def in_part(method: Method, part: str) -> bool:
    return method.part == part or (part == "budgets" and method.passes is not None)


def cell_folder(output: Path, method: Method, seed: int) -> Path:
    safe = "".join(c if c.isalnum() else "-" for c in method.name)
    return output / "runs" / method.part.replace(" ", "-") / safe / f"seed-{seed}"


# -- the processes ----------------------------------------------------------------------------------------------------


def run_workers(output: Path, processes: int, wanted: list[tuple[Method, int]]) -> None:
    """Starts the processes, each on its share of the cores, and says how far they are until all is done."""
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "passive"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", str(number)],
            env=environment,
            stdout=(output / f"worker-{number}.log").open("a"),
            stderr=subprocess.STDOUT,
        )
        for number in range(processes)
    ]
    start, first = time.monotonic(), count_done(output, wanted)
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(5)
            say_progress(output, wanted, first, time.monotonic() - start)
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
        raise SystemExit(
            f"\nstopped; the same command goes on: {count_done(output, wanted)} of {len(wanted)}"
        ) from None
    if failed := [number for number, worker in enumerate(workers) if worker.returncode]:
        raise SystemExit(f"process {failed[0]} failed, see {output}/worker-{failed[0]}.log; the same command goes on")
    print(f"\nall {len(wanted)} trainings are done: python benchmarks/study_report.py {output}")


def count_done(output: Path, wanted: list[tuple[Method, int]]) -> int:
    return sum((cell_folder(output, method, seed) / RESULT).exists() for method, seed in wanted)


def say_progress(output: Path, wanted: list[tuple[Method, int]], first: int, seconds: float) -> None:
    done = count_done(output, wanted)
    left = f", {seconds / (done - first) * (len(wanted) - done) / 60:.0f} min left" if done > first else ""
    print(f"\r{done} of {len(wanted)} trainings, {seconds / 60:.0f} min{left}   ", end="", flush=True)


def work(output: Path, setup: Setup, wanted: list[tuple[Method, int]], number: int) -> None:
    """Trains what no other process has taken, one after the other."""
    from study_training import Bench  # loads torch

    bench = Bench(output, setup, number)
    for method, seed in wanted:
        folder = cell_folder(output, method, seed)
        if not (folder / RESULT).exists() and bench.takes(folder):
            bench.train(method, seed, folder)


def prepare(output: Path) -> None:
    """Makes the warmed-up student, its measured difficulty and the teacher's cache, each once."""
    if (output / "prepared" / "done").exists():
        return
    print(f"preparing the student, its difficulty and the teacher's cache: see {output}/prepare.log", flush=True)
    with (output / "prepare.log").open("a") as log:
        script = str(Path(__file__).with_name("study_training.py"))
        code = subprocess.run([sys.executable, script, str(output)], stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"preparing failed, see {output}/prepare.log; the same command goes on")


if __name__ == "__main__":
    main()
