"""The fused linear loss takes an eighth of the time and a tenth of the memory of logits and a loss by hand (on a CPU).

A part of the tokens is supervised; student and teacher are in bf16, gradients go to the student's hidden states and
lm_head. "by hand" multiplies every token, as a model's forward does, and takes log-softmaxes in fp32 of the supervised
ones; "by hand, masked" takes them of all tokens; "by hand, supervised" selects the tokens before the lm_head. For
cross-entropy alone the other side is torch's `linear_cross_entropy`, as it comes and chunked, on the supervised tokens.
"liger" is its chunked JSD, on a GPU. "products alone" are the lm_heads' matrix products and nothing else: each once
over all supervised tokens, rounded to bf16. They are less work than ours, whose logits and sums are fp32.

All sides run in turns on the same tensors; figures are medians, on a GPU of its own time with the L2 cache flushed.
Memory is the peak beyond inputs and gradients: on a GPU of one more step after the timing, on a CPU of a process of its
own. The last table is the error of the hidden states' gradient against float64 when the teacher's logits are within
0.05 of the student's. The result is linear.json, saved after each table. When the budget runs out, sides and tables are
dropped, and named.

    python benchmarks/linear_loss.py [--device cuda] [--tokens 4096] [--supervised 1024] [--vocabulary 49152]
        [--hidden 576] [--teacher-hidden 576] [--repeats 3] [--no-memory] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from device import Device, machine, save
from loss_cpu import by_hand, median_seconds, resident_bytes
from table_form import Table, console
from torch import Tensor
from torch.nn import functional as F

from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher

JSD = Objective("jsd", temperature=1.33, alpha=0.3, beta=0.5, temperature_scaling="none")
OBJECTIVE = Objective("forward_kl", temperature=1.33, alpha=0.3)
CE = Objective(alpha=1.0)
FIRST_GUESS = {"ours": 10.0, "liger": 45.0}  # seconds a side's first step may take, for it compiles; others 3
PROCESS_SECONDS = 20.0  # that a side's memory on a CPU may take, in its process


class Inputs:
    """Hidden states and lm_heads; the students' want gradients."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        N, n, V = options.tokens, options.supervised, options.vocabulary
        H, H_t, device = options.hidden, options.teacher_hidden, options.device

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.hidden = normal(N, H).requires_grad_()
        self.weight = normal(V, H, scale=3 * H**-0.5).requires_grad_()
        self.teacher_hidden, self.teacher_weight = normal(N, H_t), normal(V, H_t, scale=3 * H_t**-0.5)
        self.labels = torch.full((N,), -100, device=device)
        self.labels[torch.randperm(N, device=device)[:n]] = torch.randint(0, V, (n,), device=device)
        self.chosen = (self.labels != -100).nonzero()[:, 0]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student's and teacher's hidden states and labels of the supervised tokens."""
        return self.hidden[self.chosen], self.teacher_hidden[self.chosen], self.labels[self.chosen]


def ours(x: Inputs, number: int) -> Tensor:
    teacher = LinearTeacher(x.teacher_hidden, x.teacher_weight)
    return linear_distillation_loss(x.hidden, x.weight, teacher, x.labels, OBJECTIVE, max_supervised=number).loss


def naive(x: Inputs, _number: int) -> Tensor:
    student, teacher = F.linear(x.hidden, x.weight), F.linear(x.teacher_hidden, x.teacher_weight)
    return by_hand(student[x.chosen], teacher[x.chosen], x.labels[x.chosen], OBJECTIVE)


def naive_masked(x: Inputs, _number: int) -> Tensor:
    """As a training script does: every token's loss, those that do not count masked out."""
    s, t = F.linear(x.hidden, x.weight).float(), F.linear(x.teacher_hidden, x.teacher_weight).float()
    tau, alpha = 1.33, 0.3
    log_q, log_p = F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1)
    D = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counted = x.labels != -100
    D = (D * counted).sum() / counted.sum()
    return alpha * F.cross_entropy(s, x.labels) + (1 - alpha) * tau**2 * D


def naive_supervised(x: Inputs, _number: int) -> Tensor:
    hidden, teacher_hidden, labels = x.rows()
    return by_hand(F.linear(hidden, x.weight), F.linear(teacher_hidden, x.teacher_weight), labels, OBJECTIVE)


def our_jsd(x: Inputs, number: int) -> Tensor:
    teacher = LinearTeacher(x.teacher_hidden, x.teacher_weight)
    return linear_distillation_loss(x.hidden, x.weight, teacher, x.labels, JSD, max_supervised=number).loss


def liger_jsd(x: Inputs, _number: int) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    hidden, teacher_hidden, labels = x.rows()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=0.5, temperature=1.33, chunk_size=1024
    )
    out = loss(hidden, x.weight, teacher_hidden, x.teacher_weight, labels)
    return out[0] if isinstance(out, tuple) else out


def products(x: Inputs, _number: int, teacher: bool = True) -> Tensor:
    """The matrix products on the supervised tokens, rounded to bf16 as torch does: four, or three without a teacher."""
    hidden, teacher_hidden, _ = x.rows()
    h, weight = hidden.detach(), x.weight.detach()
    logits = h @ weight.t()
    if teacher:
        teacher_hidden @ x.teacher_weight.t()
    logits @ weight
    logits.t() @ h
    return x.hidden.sum() * 0


def our_ce(x: Inputs, number: int) -> Tensor:
    return linear_distillation_loss(x.hidden, x.weight, None, x.labels, CE, max_supervised=number).loss


def torch_ce(x: Inputs, _number: int, **options: Any) -> Tensor:
    hidden, _, labels = x.rows()
    return F.linear_cross_entropy(hidden, x.weight, labels, **options)


def torch_ce_chunked(x: Inputs, number: int) -> Tensor:
    return torch_ce(x, number, options=torch.nn.LinearCrossEntropyOptions())


Loss = Callable[[Inputs, int], Tensor]
TABLES: dict[str, dict[str, Loss]] = {
    "forward KL + CE": {
        "ours": ours,
        "products alone": products,
        "by hand, masked": naive_masked,
        "by hand": naive,
        "by hand, supervised": naive_supervised,
    },
    "cross-entropy alone": {
        "ours": our_ce,
        "products alone": partial(products, teacher=False),
        "torch": torch_ce,
        "torch, chunked": torch_ce_chunked,
    },
    "JSD + CE": {"ours": our_jsd, "products alone": products, "liger": liger_jsd},
}


def absent(side: str, device: str) -> str | None:
    """Why a side cannot run here, if so."""
    if side.startswith("torch") and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if side == "liger" and device != "cuda":
        return "on a GPU alone"
    if side == "liger" and not find_spec("liger_kernel"):
        return "liger-kernel is not here"
    return None


# ---- measuring ----


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def step(table: str, side: str, x: Inputs, number: int) -> None:
    """Forward and backward once. Frees its gradients itself: left to the next side, that would be part of its time."""
    TABLES[table][side](x, number).backward()
    x.hidden.grad = x.weight.grad = None


def gradient_bytes(x: Inputs) -> int:
    return sum(t.numel() * t.element_size() for t in (x.hidden, x.weight))


def resident_peak(table: str, side: str, options: argparse.Namespace) -> int:
    """A CPU's peak of memory beyond inputs and gradients, bytes. Runs in a process of its own."""
    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**{**vars(options), "tokens": 32, "supervised": 8, "vocabulary": 64})
    step(table, side, Inputs(small), 8)
    x = Inputs(options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step(table, side, x, options.supervised)
    return resident_bytes("VmHWM") - before - gradient_bytes(x)


def first_steps(table: str, x: Inputs, options: argparse.Namespace, clock: Clock) -> tuple[dict, dict[str, str]]:
    """Each side once: the seconds it took, and why others have none."""
    seconds: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for side in TABLES[table]:
        if reason := absent(side, options.device):
            reasons[side] = f"absent: {reason}"
        elif clock.left() < FIRST_GUESS.get(side, 3.0):
            reasons[side] = "dropped: no time left"
        else:
            try:
                for _ in range(2):  # the first one compiles, fills caches and may take longer
                    began = time.perf_counter()
                    step(table, side, x, options.supervised)
                    if options.device == "cuda":
                        torch.cuda.synchronize()
                    seconds[side] = time.perf_counter() - began
            except Exception as error:
                seconds.pop(side, None)
                x.hidden.grad = x.weight.grad = None
                lines = str(error).strip().splitlines() or [""]
                reasons[side] = f"failed: {type(error).__name__}: {lines[0][:160]}"
    return seconds, reasons


def timed(
    runs: dict[str, Callable[[], None]], turn_seconds: float, device: Device | None, repeats: int, clock: Clock
) -> tuple[dict[str, float], str]:
    """Median ms of each side over as many turns as there is time for, at least one; and what is to be said of them."""
    if device is None:
        most = (clock.left() / turn_seconds - 1) / 3  # `median_seconds` takes up to three times as many and one
        turns = max(1, int(min(repeats, most)))
        seconds, others = median_seconds(runs, turns)
        said = f"other programs had {others:.0%} of the machine in the turns that count"
        return {side: 1e3 * value for side, value in seconds.items()}, f"{turns} of {repeats} turns; {said}"
    times: dict[str, list[float]] = {side: [] for side in runs}
    for turn in range(repeats):
        if turn and clock.left() < 2 * turn_seconds:
            break
        for side, run in runs.items():
            device.clear()
            times[side].append(device.milliseconds(run))
    medians = {side: statistics.median(values) for side, values in times.items()}
    return medians, f"{len(next(iter(times.values())))} of {repeats} turns"


def peak_of(table: str, side: str, device: Device | None, x: Inputs, options: argparse.Namespace, clock: Clock) -> Any:
    """MiB beyond inputs and gradients; a word where there is none."""
    if options.no_memory or side == "products alone":
        return None
    if device is not None:
        device.clear()
        peak = device.peak_bytes(partial(step, table, side, x, options.supervised))
        return None if peak is None else (peak - gradient_bytes(x)) / 2**20
    if clock.left() < PROCESS_SECONDS:
        return "no time left"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(resident_peak, table, side, options).result() / 2**20


def measured_table(table: str, device: Device | None, options: argparse.Namespace, clock: Clock) -> Table:
    """Times and memory of all sides, and over ours."""
    x = Inputs(options)
    seconds, reasons = first_steps(table, x, options, clock)
    runs = {side: partial(step, table, side, x, options.supervised) for side in seconds}
    notes, rows = [], []
    if runs:
        times, said = timed(runs, sum(seconds.values()), device, options.repeats, clock)
        notes.append(said)
    peaks = {side: peak_of(table, side, device, x, options, clock) for side in runs}

    def over_ours(figures: dict[str, Any], side: str) -> str | None:
        ours, own = figures.get("ours"), figures.get(side)
        return f"{own / ours:.2f}x" if isinstance(ours, float) and isinstance(own, float) and ours > 0 else None

    for side in runs:
        rows.append([side, times[side], over_ours(times, side), peaks[side], over_ours(peaks, side)])
    notes += [f"{side}, {reason}" for side, reason in reasons.items()]
    columns = ["side", "ms", "time over ours", "extra peak MiB", "peak over ours"]
    return {"title": f"The linear loss: {table}", "columns": columns, "rows": rows, "note": notes}


def error_table(options: argparse.Namespace) -> Table:
    small = argparse.Namespace(**{**vars(options), "tokens": 128, "supervised": 128, "teacher_hidden": options.hidden})
    x = Inputs(small)
    with torch.no_grad():  # the same lm_head, hidden states moved until the logits are 0.05 apart
        moved = torch.randn_like(x.hidden, dtype=torch.float32)
        gap = (moved @ x.weight.float().t()).std()
        teacher_hidden = (x.hidden.float() + moved * (0.05 / gap)).double()
    exact = x.hidden.detach().double().requires_grad_()
    teacher = LinearTeacher(teacher_hidden, x.weight.detach().double())
    objective = Objective("forward_kl", temperature=1.33)
    linear_distillation_loss(exact, x.weight.detach().double(), teacher, x.labels, objective).loss.backward()
    assert exact.grad is not None
    teacher_logits = teacher_hidden @ x.weight.detach().double().t()
    rows: list[list[Any]] = []
    for name in ("ours", "logits rounded to bf16"):
        hidden = x.hidden.detach().clone().requires_grad_()
        if name == "ours":
            fused_teacher = LinearTeacher(teacher_hidden.float(), x.weight.detach().float())
            linear_distillation_loss(hidden, x.weight.detach(), fused_teacher, x.labels, objective).loss.backward()
        else:
            by_hand(F.linear(hidden, x.weight.detach()), teacher_logits.bfloat16(), x.labels, objective).backward()
        assert hidden.grad is not None
        error = float((hidden.grad.double() - exact.grad).norm() / exact.grad.norm())
        if not math.isfinite(error):
            raise FloatingPointError(f"the gradient of {name} is not finite")
        rows.append([name, error])
    title = "The linear loss: error of the hidden states' gradient where the models are 0.05 apart"
    return {"title": title, "columns": ["side", "error in norm"], "rows": rows, "note": []}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--supervised", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--teacher-hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="no limit")
    options = parser.parse_args()
    options.threads = torch.get_num_threads()
    return options


def main() -> None:
    options = arguments()
    clock = Clock(options.budget)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs the same path")
    device = Device("cuda") if options.device == "cuda" else None
    setting = (
        f"{options.supervised} of {options.tokens} tokens supervised, V {options.vocabulary}, H {options.hidden},"
        f" teacher's {options.teacher_hidden}, bf16; forward and backward"
    )
    result: dict[str, Any] = {"machine": machine(options.device), "tables": [], "dropped": []}
    print(f"{result['machine']['device']}, {options.threads} threads of torch; {setting}", flush=True)
    failures = []
    makers = {name: partial(measured_table, name, device, options, clock) for name in TABLES}
    if device is None:
        del makers["JSD + CE"]
        result["dropped"].append("JSD + CE (on a GPU alone, where the other side is Liger's)")
    makers["error of the gradient"] = partial(error_table, options)
    for name, make in makers.items():
        if clock.left() < FIRST_GUESS["ours"]:
            result["dropped"].append(f"{name} (no time left)")
        else:
            try:
                table = make() | {"claim": setting}
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                table = {"title": f"The linear loss: {name}", "columns": ["side"], "rows": [], "note": [failures[-1]]}
            failures += [f"{name}: {note}" for note in table["note"] if note.startswith("ours, failed")]
            result["tables"].append(table)
            print(f"\n{console(table)}", flush=True)
        path = save(result, "linear.json")
    if result["dropped"]:
        print(f"\ndropped: {', '.join(result['dropped'])}")
    print(f"written: {path}")
    if failures:
        sys.exit("; ".join(failures))


if __name__ == "__main__":
    main()
