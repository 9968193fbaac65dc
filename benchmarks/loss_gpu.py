"""Aim, on an H100: 80 % of the 6-byte floor for KLs, 60 % for mixtures; 5 times Liger's JSD, twice torch.compile.

All sides run in this process on the same bf16 tensors, in turns, forward and backward, the L2 cache flushed before
each run; the figures are medians. "ours" is the fused loss; "eager" is written by hand on log-softmaxes in fp32;
"compiled" is torch.compile of that; "liger" is Liger's dense KLDiv, JSD or TVD kernel with the fp32 softmaxes that it
needs, and its cross-entropy, on a copy because it overwrites its input. The floor is 6 bytes a logit (two read, two of
the teacher read, two written) at the bandwidth of a large copy, measured here. Memory is the peak beyond inputs and
gradient.

Before it is timed each side is compared with the float64 reference: the loss of all tokens, the gradient of 16. A side
that does not fit the memory is run on 2, 4, ... pieces of the rows. A failure of a side is named in the table; a wrong
result of ours ends the run at once, another side's leaves it untimed and makes the exit status 1. When the time budget
runs out, sides and rows are dropped from the end of the list, torch.compile first, and named.

    python benchmarks/loss_gpu.py [--budget 420] [--objectives jsd+CE,...] [--sizes 8192x151936,...] [--sides ours,...]
    python benchmarks/loss_gpu.py --device cpu          the same path, at tiny sizes, without Liger
    python benchmarks/loss_gpu.py --plot FILE.json      the PNG of a result, on any machine
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from loss_cpu import ALPHA, TEMPERATURE, Loss, by_hand
from loss_gpu_report import SIDES, plot, print_table
from torch import Tensor

from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import DIVERGENCES, Objective

# the most important first
SIZES = {
    "cuda": [(8192, 151936), (4096, 32000), (8192, 128256)],
    "cpu": [(64, 4099), (32, 1000), (64, 2048)],
}
_ORDER = ("forward_kl", "jsd", "reverse_kl", "tvd", "skew_reverse_kl", "skew_forward_kl")
OBJECTIVES = {
    f"{name}+CE": Objective(name, temperature=TEMPERATURE, alpha=ALPHA)  # type: ignore[arg-type]
    for name in sorted(DIVERGENCES, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
} | {"forward_kl": Objective("forward_kl"), "jsd": Objective("jsd")}  # alone, at temperature 1
# of the loss, and of the gradient in norm: bf16 rounds it to 2e-3; others may do so twice, and round the loss to bf16
TOLERANCES = {"ours": (1e-5, 4e-3), "others": (1e-2, 2e-2)}
TURNS, RUNS_A_TURN, CHECKED_ROWS = 5, 3, 16
FIRST_GUESS = {"ours": 8.0, "liger": 8.0, "eager": 5.0, "compiled": 25.0}  # seconds a side takes, until one is measured


class Absent(Exception):
    """A side has nothing to be compared with."""


def liger(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Liger's dense kernels; the mean over tokens."""
    if student.device.type != "cuda":
        raise Absent("Liger's kernels need a GPU")
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.jsd import LigerJSDFunction
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction
        from liger_kernel.ops.tvd import LigerTVDLossFunction
    except ImportError as error:
        raise Absent(f"liger-kernel cannot be imported: {error}") from error
    family, tau, alpha = objective.family, objective.temperature, objective.alpha
    if family not in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        raise Absent("Liger has no kernel for it")
    softmax = torch.softmax if family == "tvd" else torch.log_softmax

    def distribution(logits: Tensor) -> Tensor:
        return softmax(logits, -1, dtype=torch.float32) if tau == 1 else softmax(logits.float() / tau, -1)

    q, p = distribution(student), distribution(teacher)
    if family == "forward_kl":
        D = LigerKLDivLossFunction.apply(q, p, "batchmean", True)
    elif family == "tvd":
        D = LigerTVDLossFunction.apply(q, p)
    else:
        D = LigerJSDFunction.apply(q, p, None, 1.0 if family == "reverse_kl" else objective.teacher_share)
    D = tau**objective.temperature_power * D
    if alpha == 0:
        return D
    ce = LigerCrossEntropyFunction.apply(student.clone(), labels, None)[0]
    return alpha * ce + (1 - alpha) * D


def loss_of(side: str, device: str) -> Loss:
    if side == "ours":
        backend = "triton" if device == "cuda" else "cpp"
        return lambda s, t, labels, objective: distillation_loss(s, t, labels, objective, backend=backend).loss  # type: ignore[arg-type]
    if side == "compiled":
        torch._dynamo.reset()  # each row compiled for its own sizes
        return torch.compile(by_hand, dynamic=False)
    return {"eager": by_hand, "liger": liger}[side]


def step(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective, pieces: int) -> Tensor:
    """Forward and backward once: the mean loss, and the gradient in student.grad."""
    student.grad = None
    if pieces == 1:
        value = loss(student, teacher, labels, objective)
        value.backward()
        return value.detach()
    gradient, values = torch.empty_like(student), []
    for out, s, t, y in zip(*(x.detach().chunk(pieces) for x in (gradient, student, teacher, labels)), strict=True):
        s = s.requires_grad_(True)
        value = loss(s, t, y, objective) * (len(s) / len(student))
        out.copy_(torch.autograd.grad(value, s)[0])
        values.append(value.detach())
    student.grad = gradient
    return torch.stack(values).sum()


class Device:
    """A GPU, or the CPU in its place: how to time a run and what it took."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "cuda":
            L2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
            self.flush = torch.empty(max(2 * L2, 256 << 20), dtype=torch.int8, device="cuda")
        megabytes = 1024 if kind == "cuda" else 32
        source = torch.zeros(megabytes << 20, dtype=torch.int8, device=kind)
        target = torch.zeros_like(source)
        times = [self.milliseconds(lambda: target.copy_(source)) for _ in range(12)]
        self.copy_bytes_a_second = 2e3 * source.numel() / statistics.median(times[2:])

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """The GPU's own time: it is kept busy until the host has queued what a host can queue."""
        if self.kind == "cpu":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # cycles, about 1 ms
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def clear(self) -> None:
        """Gives unused memory back, so that no side runs in the fragments that another left."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """The most memory that was allocated during a run beyond what was before."""
        if self.kind == "cpu":
            run()
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, Any]:
        versions = {"device": f"CPU, {platform.machine()}", "torch": torch.__version__}
        versions["triton"] = version("triton") if find_spec("triton") else "missing"
        if self.kind == "cuda":
            versions["device"] = torch.cuda.get_device_name()
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            try:
                versions["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
            except OSError:
                versions["driver"] = "unknown"
        return versions | {"copy_GB_a_second": self.copy_bytes_a_second / 1e9}


class Budget:
    """Decides by what sides took so far whether one more fits, with the cheaper sides of all later rows kept back."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.taken: dict[str, list[float]] = {side: [] for side in SIDES}

    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, side: str, sides: list[str], rows_after: int) -> bool:
        """What is kept back is each side's least, without its first, which bears what happens once."""
        kept_back = rows_after * sum(min(self.taken[cheaper][1:], default=0) for cheaper in sides[: sides.index(side)])
        cost = self.taken[side][-1] if self.taken[side] else FIRST_GUESS[side]
        return cost + kept_back < self.left()


def exact(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> tuple[float, Tensor]:
    """In float64: the mean loss, and the gradient of the first and last rows."""
    N, total = len(student), 0.0
    half = min(CHECKED_ROWS // 2, N // 2)

    def loss(s: Tensor, rows: slice) -> Tensor:
        out = distillation_loss(
            s, teacher[rows].double(), labels[rows], objective, reduction="sum", backend="reference"
        )
        return out.loss / N

    with torch.no_grad():
        for n in range(0, N, 64):
            total += float(loss(student[n : n + 64].double(), slice(n, n + 64)))
    gradients = []
    for rows in (slice(0, half), slice(N - half, N)):
        s = student.detach()[rows].double().requires_grad_(True)
        gradients.append(torch.autograd.grad(loss(s, rows), s)[0])
    return total, torch.cat(gradients)


def prepare(side: str, device: Device, inputs: tuple[Tensor, Tensor, Tensor], objective: Objective) -> tuple:
    """The side's run, in as few pieces as the memory asks for, run once: (run, its loss, pieces)."""
    for pieces in (1, 2, 4, 8, 16, 32):
        loss = loss_of(side, device.kind)
        try:
            value = step(loss, *inputs, objective, pieces)
            return partial(step, loss, *inputs, objective, pieces), float(value), pieces
        except torch.OutOfMemoryError:
            inputs[0].grad = None
        device.clear()
    raise RuntimeError("out of memory, even in 32 pieces")


def checked(side: str, value: float, gradient: Tensor, want: tuple[float, Tensor]) -> dict[str, Any]:
    """The errors, and `wrong` where they are too large."""
    half = len(want[1]) // 2
    rows = torch.cat([gradient[:half], gradient[-half:]]).double()
    loss_error = abs(value - want[0]) / abs(want[0])
    gradient_error = float((rows - want[1]).norm() / want[1].norm())
    errors: dict[str, Any] = {"loss_error": loss_error, "gradient_error": gradient_error}
    loss_limit, gradient_limit = TOLERANCES.get(side, TOLERANCES["others"])
    if not (loss_error <= loss_limit and gradient_error <= gradient_limit):
        errors["wrong"] = f"loss off by {loss_error:.1e}, gradient by {gradient_error:.1e}"
    return errors


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def measure_row(device: Device, N: int, V: int, name: str, sides: list[str], budget: Budget, rows_after: int) -> dict:
    """Every side of one objective at one size: its times, memory and errors, or why there are none."""
    began = time.monotonic()
    objective, results, runs = OBJECTIVES[name], {}, {}
    torch.manual_seed(0)
    student = torch.empty(N, V, device=device.kind, dtype=torch.bfloat16).normal_(std=3).requires_grad_(True)
    teacher = torch.empty_like(student, requires_grad=False).normal_(std=3)
    inputs = (student, teacher, torch.randint(0, V, (N,), device=device.kind))
    want = exact(*inputs, objective)
    for side in sides:
        if side != sides[0] and not budget.allows(side, sides, rows_after):
            results[side] = {"dropped": "no time left"}
            continue
        try:
            device.clear()
            run, value, pieces = prepare(side, device, inputs, objective)
            results[side] = {"pieces": pieces, **checked(side, value, student.grad, want)}
            if "wrong" not in results[side]:
                runs[side] = run
            elif side == "ours":
                return results
        except Absent as reason:
            results[side] = {"absent": str(reason)}
        except Exception as error:
            traceback.print_exc(limit=3)
            results[side] = {"failed": one_line(error)}
        student.grad = None
        results[side]["seconds"] = time.monotonic() - began  # the first side's with the inputs' and the reference's
        began = time.monotonic()
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(TURNS):
        for side, run in list(runs.items()):
            began = time.monotonic()
            try:
                device.clear()
                student.grad = None
                peak = device.peak_bytes(run)  # the untimed run of the turn
                times[side] += [device.milliseconds(run) for _ in range(RUNS_A_TURN)]
            except Exception as error:
                results[side]["failed"] = one_line(error)
                del runs[side]
                continue
            if peak is not None:
                results[side]["peak_extra_bytes"] = peak - student.numel() * student.element_size()
            results[side]["seconds"] += time.monotonic() - began
    for side in runs:
        results[side] |= {
            "ms": statistics.median(times[side]),
            "fastest_ms": min(times[side]),
            "runs": len(times[side]),
        }
    for side, result in results.items():
        if "seconds" in result:
            budget.taken[side].append(result["seconds"])
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, help="seconds for the measuring; 420, on a CPU 60")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="with commas between")
    parser.add_argument("--sizes", help="NxV, with commas between")
    parser.add_argument("--sides", default=",".join(SIDES), help="with commas between")
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="only draw the PNG beside a result")
    options = parser.parse_args()
    options.budget = options.budget or (420 if options.device == "cuda" else 60)
    options.objectives = options.objectives.split(",")
    options.sides = [side for side in SIDES if side in options.sides.split(",")]
    if unknown := set(options.objectives) - set(OBJECTIVES):
        parser.error(f"no objective {', '.join(sorted(unknown))}; there are {', '.join(OBJECTIVES)}")
    sizes = options.sizes.split(",") if options.sizes else []
    options.sizes = [tuple(map(int, size.split("x"))) for size in sizes] or SIZES[options.device]
    return options


def save(result: dict[str, Any], name: str) -> Path:
    folder = Path(os.environ.get("OUT") or Path(__file__).resolve().parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return path


def measure_all(
    device: Device, options: argparse.Namespace, budget: Budget, result: dict[str, Any]
) -> tuple[str | None, Path]:
    """Fills `result` row by row, each saved; what should make the exit status 1, and the file."""
    rows = [(N, V, name) for N, V in options.sizes for name in options.objectives]
    failures, path = [], save(result, f"loss_{device.kind}.json")
    for number, (N, V, name) in enumerate(rows):
        if not budget.allows(options.sides[0], options.sides, 0):
            result["dropped"].append(f"{name} {N} x {V}")
            continue
        try:
            sides = measure_row(device, N, V, name, options.sides, budget, len(rows) - number - 1)
        except KeyboardInterrupt:
            return f"interrupted at {name} {N} x {V}", path
        except Exception as error:  # of no side: not even the inputs fit, say
            traceback.print_exc()
            sides = {side: {"failed": one_line(error)} for side in options.sides}
        floor_ms = 6e3 * N * V / device.copy_bytes_a_second
        result["rows"].append({"objective": name, "N": N, "V": V, "floor_ms": floor_ms, "sides": sides})
        path = save(result, path.name)
        times = ", ".join(f"{side} {r['ms']:.2f} ms" for side, r in sides.items() if "ms" in r)
        print(f"{budget.left():4.0f} s left; {name} {N} x {V}: {times}", file=sys.stderr, flush=True)
        failures += [f"{side} is wrong at {name} {N} x {V}: {r['wrong']}" for side, r in sides.items() if "wrong" in r]
        if "wrong" in sides.get("ours", {}):
            break
    return "; ".join(failures) or None, path


def main() -> None:
    options = arguments()
    if options.plot:
        plot(json.loads(options.plot.read_text(encoding="utf-8")), options.plot.with_suffix(".png"))
        return
    budget = Budget(options.budget)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs the same path at tiny sizes")
    device = Device(options.device)
    result: dict[str, Any] = {"machine": device.facts(), "rows": [], "dropped": []}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), flush=True)
    failure, path = measure_all(device, options, budget, result)
    print_table(result)
    print(f"written: {path}")
    try:
        if not result["rows"]:
            sys.exit(failure or "nothing was measured: the budget is too small")
        plot(result, path.with_suffix(".png"))
        print(f"written: {path.with_suffix('.png')}")
    except ImportError:
        print(f"matplotlib is not here; elsewhere: python benchmarks/loss_gpu.py --plot {path.name}")
    if failure:
        sys.exit(failure)


if __name__ == "__main__":
    main()
