"""A distillation step of PoclTrainer takes a fraction of a padded loop's time and memory, at the same losses.

Teacher and student have real shapes and random weights. All sides train the same student weights on the same batches of
random tokens under forward KL at temperature 1, without cross-entropy; AdamW (fused, 1e-4, no decay), gradients clipped
to 1. On a GPU the teacher's weights are bf16 and the student's fp32 with products autocast to bf16, as PoclTrainer does
by default, on every side; on a CPU all is fp32.

    ours        PoclTrainer: its first epoch, in which the teacher runs and its cache is filled, and the second, which
                reads that cache; the teacher's lm_head runs in both
    plain       a rectangle padded to the longest with its mask, sdpa, all logits, log-softmaxes in fp32, the teacher at
                every step
    liger       the same rectangle and teacher; supervised hidden states go into LigerFusedLinearJSDLoss at beta 0,
                which is forward KL, not compiled. liger-compiled: compiled, its default; liger-kernel: the Triton
                LigerFusedLinearJSD

A side takes WARM_UP steps, one under the profiler, and TIMED ones. A step is timed on the GPU, from the end of the one
before to its own end, with no wait but the side's own; figures are medians over the timed steps. MFU is what a step
needs, by one formula for every side (`Pair.step_flops`), over time and the speed of a large product measured here.
A padded side that does not fit the memory takes its batches in 2, 4, ... pieces, and that is named; what fails, is
absent or is dropped for want of time is named too. Exit status 1: ours failed, or its losses are not plain's.

    python benchmarks/train_gpu.py [--shapes NAME] [--batches 16,64] [--sides ours,plain] [--budget SECONDS]
    python benchmarks/train_gpu.py --device cpu         the same path, at tiny sizes
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from device import Device, save
from train_gpu_sides import SHAPES, Absent, Pair, Run, Step, free_memory, product_speed, train_ours, train_padded

from pocl_fast.system.errors import Interrupted

DEFAULTS = {  # by device: shapes, samples of a batch, tokens of a sample, seconds
    "cuda": ("qwen3-1.7b-0.6b", (16, 64), (64, 512), 90.0),
    "cpu": ("tiny", (4, 8), (8, 32), 60.0),
}
# the most important first, and seconds one may take until it was measured; a compiler may take a minute
SIDES = {"ours": 20.0, "plain": 10.0, "liger": 10.0, "liger-kernel": 10.0, "liger-compiled": 45.0}
FIRST, CACHED = "ours, first epoch", "ours, cached"
WARM_UP, TIMED = 2, 5
STEPS = WARM_UP + 1 + TIMED  # of an epoch
TOLERANCE = {"cuda": 2e-2, "cpu": 1e-3}  # of a loss: bf16 rounds the plain loop's logits; fp32 sums in another order
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace during which a GPU is not idle
LARGEST = 12  # kernels that are kept by name
NO_FIGURES = ("failed", "absent", "dropped")  # why a side has none


class Watch:
    """Follows the steps of an epoch: some to warm up, one under the profiler, then the timed ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._profiler: Any = None  # while it runs
        self.restart()

    def restart(self) -> None:
        self.close()
        self.done = 0
        self.profile: dict[str, Any] = {}
        self.peak_bytes: int | None = None
        self._marks: list[Any] = []  # the ends of the profiled step and of each timed one

    def step_done(self) -> None:
        self.done += 1
        if self.done == WARM_UP:
            self._start_profile()
        elif self.done == WARM_UP + 1:
            self._end_profile()
            if self.kind == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if WARM_UP < self.done <= STEPS:
            self._marks.append(self._mark())
        if self.done == STEPS and self.kind == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()

    def close(self) -> None:
        """Ends a profile that a failure has left running: another could not begin."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def seconds(self) -> list[float]:
        """Of each timed step."""
        synchronise(self.kind)
        steps = itertools.pairwise(self._marks)
        return [end - start if self.kind == "cpu" else start.elapsed_time(end) / 1e3 for start, end in steps]

    def _mark(self) -> Any:
        if self.kind == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start_profile(self) -> None:
        """On a GPU of the GPU alone: to note each operator would slow the host down."""
        activity = torch.profiler.ProfilerActivity
        self._profiler = torch.profiler.profile(activities=[activity.CUDA if self.kind == "cuda" else activity.CPU])
        synchronise(self.kind)
        self._profiler.start()
        self._began = time.perf_counter()

    def _end_profile(self) -> None:
        synchronise(self.kind)
        span_ms = 1e3 * (time.perf_counter() - self._began)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
        self.profile = read_trace(trace, span_ms, gpu=self.kind == "cuda")


def synchronise(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def merged(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what (start, end) intervals cover together."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def read_trace(trace: dict[str, Any], span_ms: float, *, gpu: bool) -> dict[str, Any]:
    """What the chrome trace of a step that took `span_ms` says; the times in it are in µs."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    if not gpu:
        return {"span_ms": span_ms, "operator_calls": sum(event.get("cat") == "cpu_op" for event in events)}
    busy_ms = merged((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_GPU) / 1e3
    kernels: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            kernels.setdefault(event["name"][:200], []).append(event["dur"] / 1e3)
    if not kernels:
        return {"span_ms": span_ms, "launches": 0, "missing": "the trace has no kernel: is CUPTI here?"}
    largest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:LARGEST]
    return {
        "span_ms": span_ms,
        "busy_ms": busy_ms,
        "idle_share": 1 - busy_ms / span_ms,
        "launches": sum(map(len, kernels.values())),
        "largest_kernels": [{"name": name, "ms": sum(times), "calls": len(times)} for name, times in largest],
    }


def figures(watch: Watch, steps: Sequence[Step], pair: Pair, peak_flops: float, *, teacher_runs: bool) -> dict:
    """What was measured of the steps of an epoch."""
    seconds, timed = watch.seconds(), steps[WARM_UP + 1 : STEPS]
    tokens = [sum(map(len, step)) for step in timed]
    supervised = [sum(len(sample.response_ids) for sample in step) for step in timed]
    sizes = zip(timed, supervised, strict=True)
    flops = [pair.step_flops(map(len, step), n, teacher_runs=teacher_runs) for step, n in sizes]

    def rate(amounts: list[int]) -> float:
        return statistics.median(amount / s for amount, s in zip(amounts, seconds, strict=True))

    return {
        "seconds_a_step": statistics.median(seconds),
        "seconds": seconds,  # the last of ours' first epoch also ends the writing of the cache
        "tokens_a_second": rate(tokens),
        "supervised_tokens_a_second": rate(supervised),
        "needed_flops": flops,
        "mfu": rate(flops) / peak_flops,
        "peak_bytes": watch.peak_bytes,
        "profile": watch.profile,
    }


def run_ours(run: Run, peak_flops: float) -> dict[str, dict[str, Any]]:
    watches = {FIRST: Watch(run.kind), CACHED: Watch(run.kind)}

    def step_done() -> None:
        watches[FIRST if watches[FIRST].done < STEPS else CACHED].step_done()

    try:
        losses, pieces = train_ours(run, step_done)
    finally:
        for watch in watches.values():
            watch.close()
    parts = {FIRST: slice(0, STEPS), CACHED: slice(STEPS, 2 * STEPS)}
    return {
        name: figures(watch, run.steps[parts[name]], run.pair, peak_flops, teacher_runs=name == FIRST)
        | {"losses": losses[parts[name]], "pieces": pieces}
        for name, watch in watches.items()
    }


def run_padded(side: str, run: Run, peak_flops: float) -> dict[str, dict[str, Any]]:
    """Its steps are alike in all epochs: the first is measured, and plain's second is for its losses."""
    watch = Watch(run.kind)
    try:
        losses, pieces = train_padded(side, run, STEPS * (2 if side == "plain" else 1), watch.restart, watch.step_done)
    finally:
        watch.close()
    measured = figures(watch, run.steps, run.pair, peak_flops, teacher_runs=True)
    return {side: measured | {"losses": losses, "pieces": pieces}}


class Budget:
    """Whether a side fits into the time that is left, by what it took with another batch."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._taken: dict[str, tuple[int, float, float]] = {}  # batch, seconds, those of its steps

    def left(self) -> float:
        return self.end - time.monotonic()

    def took(self, side: str, batch: int, seconds: float, results: dict[str, dict[str, Any]]) -> None:
        steps = sum(len(r["losses"]) * r["seconds_a_step"] for r in results.values() if "losses" in r)
        self._taken[side] = (batch, seconds, steps)

    def allows(self, side: str, batch: int, kind: str) -> bool:
        if side not in self._taken:
            return (SIDES[side] if kind == "cuda" else 3.0) < self.left()
        before, seconds, steps = self._taken[side]
        return seconds + steps * (batch / before - 1) < self.left()


def measure_side(side: str, run: Run, peak_flops: float) -> dict[str, dict[str, Any]]:
    """The outcomes of a side, by name: figures, or why there are none."""
    try:
        free_memory(run.kind)  # which the side before has left
        return run_ours(run, peak_flops) if side == "ours" else run_padded(side, run, peak_flops)
    except Absent as reason:
        why = {"absent": str(reason)}
    except Exception as error:
        traceback.print_exc(limit=4)
        first_line = (str(error).strip().splitlines() or [""])[0]
        why = {"failed": f"{type(error).__name__}: {first_line[:160]}"}
    return {FIRST: why, CACHED: why} if side == "ours" else {side: why}


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the losses of the steps that both took; infinite where one is NaN."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=False)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def compared(side: str, row: dict[str, Any], kind: str) -> str | None:
    """Notes how far a side's losses are from ours; says what should make the exit status 1."""
    ours, other = row["sides"].get(FIRST, {}), row["sides"].get(side, {})
    if side == "ours":
        return f"ours failed with batches of {row['batch']}" if "failed" in ours else None
    if "losses" not in ours or "losses" not in other:
        return None
    gap = other["loss_gap"] = largest_gap(ours["losses"] + row["sides"][CACHED]["losses"], other["losses"])
    if side == "plain" and gap > TOLERANCE[kind]:
        return f"with batches of {row['batch']} a loss of ours is {gap:.1e} off plain's, over {TOLERANCE[kind]}"
    return None


def cells_of(result: dict[str, Any], first: float | None, cached: float | None) -> tuple[str, ...]:
    """A side's cells of the table; `first` and `cached` are ours' seconds a step."""
    step, profile, peak, gap = (result.get(key) for key in ("seconds_a_step", "profile", "peak_bytes", "loss_gap"))
    return (
        f"{1e3 * step:.1f}",
        *(f"{step / ours:.2f}x" if ours else "-" for ours in (first, cached)),
        f"{result['tokens_a_second']:,.0f}",
        f"{result['supervised_tokens_a_second']:,.0f}",
        f"{100 * result['mfu']:.1f} %",
        f"{peak / 2**30:.1f}" if peak else "-",
        f"{profile.get('launches', profile.get('operator_calls')):,}",
        f"{100 * profile['idle_share']:.0f} %" if "idle_share" in profile else "-",
        f"{gap:.0e}" if gap is not None else "-",
    )


def print_row(row: dict[str, Any], launches: str) -> None:
    """The sides with one size of batch, and their losses step by step, ours of both epochs in one column."""
    columns = f"ms a step,/ first,/ cached,tokens/s,supervised/s,MFU,GiB,{launches},idle,loss off".split(",")
    widths = [max(len(name), 8) + 2 for name in columns]
    print(
        f"\nbatches of {row['batch']}: {row['tokens_a_step']:,.0f} tokens a step, {row['supervised_a_step']:,.0f}"
        f" supervised; {100 * row['padding']:.0f} % of the rectangles is padding"
    )
    print(f"{'':<18}" + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    sides = row["sides"]
    first, cached = (sides.get(side, {}).get("seconds_a_step") for side in (FIRST, CACHED))
    for side, result in sides.items():
        why = next((word for word in NO_FIGURES if word in result), None)
        cells = (why,) if why else cells_of(result, first, cached)
        print(f"{side:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)))
        if why:
            print(f"    {result[why]}")
        if result.get("pieces", 1) > 1:
            print(f"    a batch does not fit the memory whole: in {result['pieces']} pieces")
    losses = {side: result["losses"] for side, result in sides.items() if "losses" in result}
    if CACHED in losses:
        losses = {"ours": losses.pop(FIRST) + losses.pop(CACHED)} | losses
    if losses:
        print("losses  " + "".join(f"{side:>16}" for side in losses))
    for step, values in enumerate(itertools.zip_longest(*losses.values())):
        print(f"step {step + 1:>3}" + "".join(f"{'-' if x is None else f'{x:.6f}':>16}" for x in values))


def print_table(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        print_row(row, "launches" if result["gpu"] else "operators")
    print(
        "\n/: time over that of ours; MFU: flops that a step needs, over time and the measured peak; idle: share of a"
    )
    print("profiled step in which the GPU does nothing; loss off: largest relative difference from ours")
    if not result["gpu"]:
        print("a CPU has no GiB (its peak is that of the whole process) and no idle (no queue runs empty)")


def measure_all(sides: Sequence[str], runs: Sequence[Run], budget: Budget, result: dict[str, Any]) -> None:
    """Fills `result`, saved after every side."""
    for side, (run, row) in itertools.product(sides, zip(runs, result["rows"], strict=True)):
        began = time.monotonic()
        if budget.allows(side, run.batch, run.kind):
            results = measure_side(side, run, result["peak_flops_a_second"])
            budget.took(side, run.batch, time.monotonic() - began, results)
        else:
            results = {side: {"dropped": "no time left"}}
        row["sides"] |= results
        result["failures"] += [why for why in [compared(side, row, run.kind)] if why]
        save(result, "training.json")
        print(f"{budget.left():4.0f} s left; {side}, batches of {run.batch}: done", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=SHAPES, help="teacher and student; tiny on a CPU")
    parser.add_argument("--batches", help="samples of a batch, with commas between")
    parser.add_argument("--sides", default=",".join(SIDES), help="with commas between")
    parser.add_argument("--budget", type=float, help="seconds; 90, on a CPU 60")
    options = parser.parse_args()
    shapes, batches, options.lengths, budget = DEFAULTS[options.device]
    options.shapes, options.budget = options.shapes or shapes, options.budget or budget
    options.batches = [int(n) for n in options.batches.split(",")] if options.batches else batches
    if unknown := set(options.sides.split(",")) - set(SIDES):
        parser.error(f"no side {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    options.sides = [side for side in SIDES if side in options.sides.split(",")]
    return options


def main() -> None:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs the same path at tiny sizes")
    if options.device == "cpu":
        torch.set_num_threads(1)  # products this small gain nothing from more
    budget, pair = Budget(options.budget), SHAPES[options.shapes]
    device = Device(options.device)
    peak_flops, facts = product_speed(device), device.facts()
    del device  # its buffers would count as memory of every side
    free_memory(options.device)
    runs = [Run.of(pair, options.device, batch, STEPS, options.lengths) for batch in options.batches]
    result = {
        "machine": facts,
        "gpu": options.device == "cuda",
        "shapes": options.shapes,
        "models": asdict(pair),
        "tokens_of_a_sample": options.lengths,
        "peak_flops_a_second": peak_flops,
        "rows": [run.facts(STEPS) | {"sides": {}} for run in runs],
        "failures": [],  # what makes the exit status 1
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{options.shapes}; a large product runs at {peak_flops / 1e12:.3g} TFLOP/s", flush=True)
    try:
        measure_all(options.sides, runs, budget, result)
    except (KeyboardInterrupt, Interrupted):
        result["failures"].append("interrupted")
    print_table(result)
    print(f"written: {save(result, 'training.json')}")
    if result["failures"]:
        sys.exit("; ".join(result["failures"]))


if __name__ == "__main__":
    main()
