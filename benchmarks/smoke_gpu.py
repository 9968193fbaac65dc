"""All that the product runs on a GPU computes what float64 says; aim: shown within a minute on 16 cores.

Losses of every divergence, products, packed attention, models, training, graphs and sizes past 2^31, each against
float64 on fresh random numbers: smoke_checks.py and smoke_models.py. Checks that share compiled kernels are a job. A
job is a process with a time limit, up to 12 at once, so that one which dies takes no other along; what it had checked
by then counts. A check that cannot run here is absent, with the reason. Exit status 1 if a check failed.

    python benchmarks/smoke_gpu.py [--jobs jsd,varlen,...] [--seed 7] [--processes 12] [--limit 120]
    python benchmarks/smoke_gpu.py --device cpu        the same jobs without a GPU, at tiny sizes, with the C++ backend
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smoke_checks
import smoke_models
import torch
from device import machine, save
from smoke_checks import SETTINGS, Absent, Check, Figure

Record = dict[str, Any]


def all_jobs(kind: str) -> dict[str, Callable[[], list[Check]]]:
    """By name, the longest first."""
    setting = SETTINGS[kind]
    models = smoke_models.jobs(setting)
    return {"training": models.pop("training")} | smoke_checks.jobs(setting) | models


# ---- in a job's process ----


def run_job(name: str, kind: str, seed: int, path: Path) -> None:
    """Runs a job's checks one by one, and adds a line to the file before and after each."""
    faulthandler.enable()
    with open(path, "a", encoding="utf-8") as file:

        def write(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for check, run in all_jobs(kind)[name]():
            write({"begun": check})
            torch.manual_seed(seed + zlib.crc32(f"{name} {check}".encode()))
            write({"check": check} | checked(run, kind))


def checked(run: Callable[[], list[Figure]], kind: str) -> Record:
    """What became of a check: its status, seconds (compiling included), figures or reason."""
    began = time.monotonic()
    record: Record
    try:
        figures = run()
        wrong = [describe(f) for f in figures if not f.error <= f.tolerance]  # a NaN is wrong, too
        record = {"status": "failed" if wrong else "passed", "figures": [vars(f) for f in figures]}
        if wrong:
            record["reason"] = "; ".join(wrong)
    except Absent as reason:
        record = {"status": "absent", "reason": str(reason)}
    except ModuleNotFoundError as error:  # a package is not here; a part of ours that is not is a fault
        ours = (error.name or "").startswith("pocl_fast")
        record = {"status": "failed" if ours else "absent", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        record = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(str(error))}"}
        record["trace"] = traceback.format_exc()[-1500:]
    if kind == "cuda":
        torch.cuda.empty_cache()  # the GPU is shared with the other jobs
    return record | {"seconds": round(time.monotonic() - began, 2)}


def describe(figure: Figure) -> str:
    return f"{figure.what} is off by {figure.error:.2g}, and {figure.tolerance:.2g} is the most"


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


# ---- around the jobs ----


class Job:
    """A job's process: what it has written, and what became of it."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        self.name, self.limit, self.began = name, options.limit, time.monotonic()
        stem = re.sub(r"\W", "_", name)
        self.records, self.log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
        self.records.touch()
        words = ["--job", name, "--device", options.device, "--seed", str(options.seed), "--records", str(self.records)]
        threads = max(1, (os.cpu_count() or 1) // options.processes)
        # threads that spin while they wait would take the others' time
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def ended(self) -> bool:
        if time.monotonic() - self.began > self.limit:
            self.process.kill()
            self.process.wait()
        return self.process.poll() is not None

    def result(self) -> Record:
        """Its checks and its seconds; a process that died leaves a failed check, with its last line and exit status."""
        checks, begun = [], "start"
        for line in self.records.read_text(encoding="utf-8").split("\n")[:-1]:  # what follows the last is half a line
            record = json.loads(line)
            if "begun" in record:
                begun = record["begun"]
            else:
                checks.append(record)
        seconds, status = time.monotonic() - self.began, self.process.returncode
        if status != 0:
            ended = f"stopped after {self.limit:.0f} s" if seconds > self.limit else f"exit status {status}"
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            last = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
            trace = "\n".join(lines[-15:])
            checks.append({"check": begun, "status": "failed", "reason": f"{ended}: {last[:300]}", "trace": trace})
        return {"job": self.name, "seconds": round(seconds, 1), "exit_status": status, "checks": checks}


def run_all(options: argparse.Namespace, result: Record) -> Path:
    """Runs the jobs, `options.processes` at once; fills `result`, which is saved after each."""
    waiting, running = list(options.jobs), []
    path = save(result, "smoke.json")
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < options.processes:
                    running.append(Job(waiting.pop(0), options, Path(folder)))
                time.sleep(0.05)
                for job in [job for job in running if job.ended()]:
                    running.remove(job)
                    result["jobs"].append(job.result())
                    result["seconds"] = round(time.monotonic() - options.began, 1)
                    path = save(result, path.name)
                    print_job(result["jobs"][-1])
        except KeyboardInterrupt:
            result["unfinished"] = [job.name for job in running] + waiting
            path = save(result, path.name)
        finally:
            for job in running:
                job.process.kill()
            for job in running:
                job.process.wait()
    return path


def print_job(job: Record) -> None:
    """One line: how many checks passed, and which figure came nearest to its limit."""
    counts = [f"{n} {status}" for status in ("passed", "failed", "absent") if (n := count(job["checks"], status))]
    figures = [(f, check["check"]) for check in job["checks"] for f in check.get("figures", [])]
    line = f"{job['job']:<18} {', '.join(counts):<20} {job['seconds']:6.1f} s"
    if figures:
        figure, check = max(figures, key=lambda pair: share_of_limit(pair[0]))
        line += (
            f"   nearest to its limit: {check}, {figure['what']}: {figure['error']:.1e} of {figure['tolerance']:.1e}"
        )
    print(line, flush=True)


def share_of_limit(figure: Record) -> float:
    if math.isnan(figure["error"]):
        return math.inf
    return figure["error"] / figure["tolerance"] if figure["tolerance"] else (math.inf if figure["error"] else 0.0)


def count(checks: list[Record], status: str) -> int:
    return sum(check["status"] == status for check in checks)


def print_end(result: Record) -> int:
    """What was absent, what failed with its figures, and the counts; how many failed."""
    checks = [(job["job"], check) for job in result["jobs"] for check in job["checks"]]
    for status in ("absent", "failed"):
        for job, check in checks:
            if check["status"] == status:
                print(f"{status}: {job}, {check['check']}: {check['reason']}")
                if "trace" in check:
                    print("    " + check["trace"].replace("\n", "\n    "), file=sys.stderr)
    passed, failed, absent = (
        count([check for _, check in checks], status) for status in ("passed", "failed", "absent")
    )
    print(f"{passed} passed, {failed} failed, {absent} absent, in {result['seconds']:.0f} s; seed {result['seed']}")
    return failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", help="with commas between; all of them")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="a fresh one")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a job may take")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = all_jobs(options.device)
    options.jobs = options.jobs.split(",") if options.jobs else list(known)
    if unknown := set(options.jobs) - set(known):
        parser.error(f"no job {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.began = time.monotonic()
    return options


def main() -> None:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs the same jobs at tiny sizes")
    if options.job:
        run_job(options.job, options.device, options.seed, options.records)
        return
    result: Record = {
        "machine": machine(options.device),
        "seed": options.seed,
        "jobs": [],
        "unfinished": [],
        "seconds": 0.0,
    }
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print(f"{len(options.jobs)} jobs, {options.processes} at once, seed {options.seed}", flush=True)
    path = run_all(options, result)
    failed = print_end(result)
    print(f"written: {path}")
    if result["unfinished"]:
        sys.exit(f"interrupted: {', '.join(result['unfinished'])} did not finish")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
