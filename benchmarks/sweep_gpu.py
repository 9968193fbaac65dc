"""Expected on an H200: forward KL + CE from 3.2 to 2.5 ms with the compiler's read-ahead; scaling by 1 for nothing.

No tile of the dense kernel was measured when it was chosen (`tiles.choose_tile`). This times others beside it: warps a
program, logits a thread (8: one load of 16 bytes a row), and how passes read ahead (`tiles.Tile.stages`). What is timed
is the row kernel and the sum of its losses, gradient included, on bf16 logits, with the L2 flushed before each run; the
median of all runs. The floor is 6 bytes a logit (two read, two of the teacher read, two written) at the bandwidth of a
large copy, measured here. A last table times the kernel that multiplies a gradient by what comes in from above: as it
is, with a program for each tile, and as it could be, with as many programs as the GPU holds (`fixed_grid`).

Before it is timed each tile's loss, and gradient of 16 rows, are compared with float64; each scaling with torch's own
product. Kernels are compiled first, several at once, on one row: compile times are those of a busy machine. When the
time budget runs out, what is left is dropped from the end of the list, and named.

Exit status 1: something is wrong; the tile that is chosen today, or the scaling as it is, does not run; another one
compiles and fails when it runs. A tile that does not compile, for it asks more than the GPU has, is named and no
failure: that is a result. Without a GPU all runs under Triton's interpreter, where nothing is compiled and so each
failure counts; but where a loop of two lines fails, too, for that Triton does not know this numpy, all is absent with
this reason.

    python benchmarks/sweep_gpu.py [--budget 80]
    python benchmarks/sweep_gpu.py --device cpu          the same path, at a tiny size
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

if "cpu" in sys.argv or "--device=cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import triton
import triton.language as tl
from device import Device, save
from loss_gpu import OBJECTIVES, checked, exact, one_line
from sweep_gpu_report import CASES, NO_TIME, Row, place, tables, words
from table_form import console
from torch import Tensor

from pocl_fast.kernels import dense, tiles
from pocl_fast.kernels.tiles import Tile
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.objective import Objective

INTERPRETED = triton.knobs.runtime.interpret
SIZES = {"cuda": [(8192, 151936), (4096, 32000)], "cpu": [(2, 300)]}
NAMES = {"cuda": ("forward_kl+CE", "jsd+CE", "tvd+CE"), "cpu": ("forward_kl+CE", "jsd+CE")}  # the most important first
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # the interpreter cuts off what hardware rounds to bf16
RUNS = {"cuda": 9, "cpu": 1}
BLOCK_V, SCALING_WARPS = 4096, 8  # of the scaling kernel, as `scale_rows_` has them for rows of 4096 and more


def candidates(kind: str) -> list[Tile]:
    """The most promising first: today's warps and logits a thread, then fewer warps, then more logits."""
    if kind == "cpu":
        return [Tile(32, 8, 1, 2), Tile(32, 16, 1, 0), Tile(32, 16, 1, 4)]
    grid = [(8, 16), (8, 8), (16, 16), (16, 8), (8, 4)]
    return [Tile(32 * warps, vec, warps, stages) for (vec, warps), stages in product(grid, (0, 4, 3, 2))]


# ---- the tile of a launch ----


class Plan(threading.local):
    """What this thread's next launch takes, and the compiled kernel that its last one ran."""

    tile: Tile | None = None
    kernel: Any = None


PLAN, CHOSEN = Plan(), tiles.choose_tile


class Noted:
    """Stands in for the row kernel: runs it, and notes which compiled kernel that was."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            PLAN.kernel = self.kernel[grid](*arguments, **options)

        return launch


def install() -> None:
    tiles.choose_tile = lambda *case: PLAN.tile or CHOSEN(*case)
    dense._rows_kernel = Noted(dense._rows_kernel)


class Inputs(NamedTuple):
    student: Tensor  # [N, V], as the teacher and the gradient
    teacher: Tensor
    labels: Tensor  # [N]
    grad: Tensor
    scale: Tensor  # [1] fp32: 1 / N, so that losses add up to their mean


def inputs_of(kind: str, N: int, V: int) -> Inputs:
    torch.manual_seed(0)
    student = torch.empty(N, V, device=kind, dtype=DTYPE[kind]).normal_(std=3)
    teacher, grad = torch.empty_like(student).normal_(std=3), torch.empty_like(student).normal_()
    return Inputs(student, teacher, torch.randint(0, V, (N,), device=kind), grad, torch.full((1,), 1 / N, device=kind))


def todays(objective: Objective, x: Inputs) -> Tile:
    capability = tiles.capability_of(x.student.device)
    return CHOSEN(objective.family, x.student.shape[1], *[x.student.element_size()] * 2, capability)


def run_rows(tile: Tile, x: Inputs, objective: Objective, values: list[Tensor], N: int | None = None) -> Tensor:
    """The loss of the first N rows; their gradient in x.grad. `values`: temperature and alpha, [1] each."""
    PLAN.tile = tile
    student, teacher, labels, grad = (tensor[:N] for tensor in x[:4])
    settings = Settings(
        objective.family, objective.teacher_share, objective.temperature_power, -100, [1.0, 0.0, 1.0, 0.0], "bucket"
    )
    tokens = Tokens(labels, *values, x.scale)
    loss, _, _ = dense.distillation_rows(student, teacher, tokens, settings, needs_grad=True, reduced=True, grad=grad)
    return loss


def failed(row: Row, error: Exception, word: str = "failed") -> None:
    """Notes a failure. Raises where it cost the GPU, so that nothing more can be measured."""
    traceback.print_exception(error, limit=3)
    row[word] = one_line(error)
    if not INTERPRETED:
        torch.cuda.synchronize()


# ---- compiling ----


def compiled(run: Callable[..., Tensor], tile: Tile) -> Row:
    """Launches a tile on one row: what became of its kernel, or why there is none."""
    began, facts = time.monotonic(), Row()
    try:
        float(run(tile, N=1))
    except Exception as error:
        failed(facts, error, "failed" if INTERPRETED else "uncompiled")
        return facts
    if PLAN.kernel is not None:  # the interpreter has none
        facts["compile_seconds"] = time.monotonic() - began
        facts["registers"], facts["spilled_words"] = (getattr(PLAN.kernel, key, None) for key in ("n_regs", "n_spills"))
        facts["shared_bytes"] = PLAN.kernel.metadata.shared
    return facts


def compile_all(run: Callable[..., Tensor], first: list[Tile], others: list[Tile], end: float) -> dict[Tile, Row]:
    """Of each tile that there was time for; `first` one by one, before threads share what Triton keeps of a kernel."""
    facts = {tile: compiled(run, tile) for tile in first}
    others = [tile for tile in others if tile not in facts]
    at_once = 1 if INTERPRETED else min(16, os.cpu_count() or 1)  # the interpreter is for one thread
    last = 0.0
    with ThreadPoolExecutor(at_once) as threads:
        for k in range(0, len(others), at_once):
            began = time.monotonic()
            if began + last > end:
                break
            part = others[k : k + at_once]
            facts |= zip(part, threads.map(partial(compiled, run), part), strict=True)
            last = time.monotonic() - began
    return facts


# ---- measuring ----


def milliseconds(device: Device, run: Callable[[], Any]) -> float:
    run()
    return statistics.median(device.milliseconds(run) for _ in range(RUNS[device.kind]))


def floor_ms(device: Device, tensor: Tensor, times: int) -> float:
    """What it takes to read or write as many bytes as such tensors have, at the bandwidth of a large copy."""
    return 1e3 * times * tensor.numel() * tensor.element_size() / device.copy_bytes_a_second


def measure_tile(device: Device, run: Callable[[], Tensor], x: Inputs, want: tuple[float, Tensor], row: Row) -> None:
    """Adds errors and time to a row, or what is wrong."""
    try:
        x.grad.fill_(float("nan"))  # what a tile does not write is wrong
        row |= checked("ours", float(run()), x.grad, want)
        if "wrong" not in row:
            row["ms"] = milliseconds(device, run)
    except Exception as error:
        failed(row, error)


def sweep_size(
    device: Device, x: Inputs, run: Callable[..., Tensor], want: tuple[float, Tensor], common: Row, grid: list[Tile],
    facts: dict[Tile, Row], end: float, result: dict[str, Any],
) -> None:  # fmt: skip
    """Every tile of one objective and size, each saved; the first, today's, once more at the end."""
    cost, rows = 0.0, []  # cost: seconds of the last tile
    for tile in grid:
        began = time.monotonic()
        if tile not in facts or began + cost > end:
            result["dropped"].append(f"{place(common)}, {words(tile)}")
            continue
        rows.append(row := common | tile._asdict() | {"today": tile == grid[0]} | facts[tile])
        result["rows"].append(row)
        if not set(NO_TIME) & set(row):
            measure_tile(device, partial(run, tile), x, want, row)
        cost = time.monotonic() - began
        saved(result)
    if rows and "ms" in rows[0] and time.monotonic() + cost < end:
        rows[0]["ms_again"] = milliseconds(device, partial(run, grid[0]))
        saved(result)


def sweep_tiles(device: Device, inputs: dict[tuple[int, int], Inputs], end: float, result: dict[str, Any]) -> None:
    """Every objective, size and tile."""
    others = candidates(device.kind)
    for name in NAMES[device.kind]:
        objective = OBJECTIVES[name]
        numbers = objective.temperature, objective.alpha
        values = [torch.full((1,), float(number), device=device.kind) for number in numbers]
        run = partial(run_rows, objective=objective, values=values)
        first = [todays(objective, x) for x in inputs.values()]
        if "absent" in result:
            facts = {tile: {"absent": result["absent"]} for tile in [*first, *others]}
        elif time.monotonic() < end:
            facts = compile_all(partial(run, x=next(iter(inputs.values()))), first, others, end)
        else:
            facts = {}
        for ((N, V), x), today in zip(inputs.items(), first, strict=True):
            want = exact(x.student, x.teacher, x.labels, objective) if facts else (0.0, x.grad)
            common = {"objective": name, "N": N, "V": V, "floor_ms": floor_ms(device, x.student, 3)}
            grid = [today, *(tile for tile in others if tile != today)]
            sweep_size(device, x, partial(run, x=x), want, common, grid, facts, end, result)
        print(f"{end - time.monotonic():4.0f} s left after {name}", file=sys.stderr, flush=True)


# ---- the scaling of a gradient ----


@triton.jit
def _fixed_grid_kernel(grad_ptr, upstream_ptr, N, V, grad_stride_n, upstream_stride_n, BLOCK_V: tl.constexpr):
    """Of the rows every so-manieth, and of each of these every so-manieth tile, times its factor unless that is 1."""
    for n in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):  # 64 bits: n * stride passes 2**31
        factor = tl.load(upstream_ptr + n * upstream_stride_n)
        if factor != 1.0:
            row = grad_ptr + n * grad_stride_n
            for v in range(tl.program_id(1) * BLOCK_V, V, tl.num_programs(1) * BLOCK_V):
                offs = v + tl.arange(0, BLOCK_V)
                g = tl.load(row + offs, mask=offs < V, other=0.0).to(tl.float32) * factor
                tl.store(row + offs, g.to(grad_ptr.dtype.element_ty), mask=offs < V)


def fixed_grid(grad: Tensor, upstream: Tensor) -> None:
    """`dense.scale_rows_` with as many programs as the GPU runs at once, whatever N and V."""
    N, V = grad.shape
    programs = 8 * torch.cuda.get_device_properties(grad.device).multi_processor_count if grad.is_cuda else 4
    grid = (min(N, programs), max(1, programs // N))
    step = int(upstream.numel() > 1)
    _fixed_grid_kernel[grid](grad, upstream, N, V, grad.stride(0), step, BLOCK_V=BLOCK_V, num_warps=SCALING_WARPS)


TODAYS_WAY, TORCHS = "a program a tile, as it is", "torch's mul_"
WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    TODAYS_WAY: dense.scale_rows_,
    "fixed grid": fixed_grid,
    TORCHS: lambda grad, upstream: grad.mul_(upstream[0]),
}


def scaling_fault(way: Callable[[Tensor, Tensor], Any], grad: Tensor) -> str | None:
    """What is wrong: the first and the last rows of many and of few are compared with torch's products, exactly."""
    for part in (grad, grad[:64]):
        N = len(part)
        ends = torch.tensor([*range(min(8, N)), *range(max(0, N - 8), N)], device=grad.device)
        for upstream in (torch.tensor([1.0, -1.0, 0.5] * N)[:N], torch.tensor([-1.0])):
            upstream = upstream.to(grad.device)
            want = (part[ends].float() * upstream.expand(N)[ends, None]).to(grad.dtype)
            way(part, upstream)
            if not torch.equal(part[ends], want):
                return f"{N} rows times {len(upstream)} factors differ from torch's products"
    return None


def sweep_scaling(device: Device, inputs: dict[tuple[int, int], Inputs], result: dict[str, Any]) -> None:
    """A row a size and way."""
    for ((N, V), x), (how, way) in product(inputs.items(), WAYS.items()):
        one = torch.ones(1, device=device.kind)
        upstreams = dict(zip(CASES, (one, one.expand(N).contiguous(), -one), strict=True))
        if how == TORCHS:
            upstreams = {CASES[-1]: -one}
        row: Row = {"how": how, "N": N, "V": V, "today": how == TODAYS_WAY}
        row["floor_ms"] = floor_ms(device, x.grad, 2)
        result["scaling"].append(row)
        if "absent" in result and how != TORCHS:
            row["absent"] = result["absent"]
            continue
        x.grad.normal_()
        try:
            if how != TORCHS and (fault := scaling_fault(way, x.grad)):
                row["wrong"] = fault
                continue
            for case, upstream in upstreams.items():
                row[case] = milliseconds(device, partial(way, x.grad, upstream))
        except Exception as error:
            failed(row, error)
        finally:
            saved(result)


# ---- the result ----


def saved(result: dict[str, Any]) -> Path:
    return save(result | {"tables": tables(result)}, "sweep.json")


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the exit status 1: see the module."""
    found = [result["stopped"]] if "stopped" in result else []
    for row in [*result["rows"], *result["scaling"]]:
        for word in ("wrong", "failed", *(("uncompiled",) if row["today"] else ())):
            if word in row:
                found.append(f"{place(row)}, {word}: {row[word]}")
    return found


# ---- without a GPU ----


@triton.jit
def _loop_kernel(x_ptr, V, BLOCK_V: tl.constexpr):
    for v in range(0, V, BLOCK_V):
        at = x_ptr + v + tl.arange(0, BLOCK_V)
        tl.store(at, 2.0 * tl.load(at))


def interpreter_fault() -> str | None:
    """Why Triton's interpreter runs nothing at all here; None where it does."""
    try:
        _loop_kernel[(1,)](torch.ones(32), 32, BLOCK_V=16)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter fails at any loop here: {one_line(error)}"
    return None


def arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, help="seconds; 80, on a CPU 25")
    options = parser.parse_args()
    options.budget = options.budget or (80 if options.device == "cuda" else 25)
    return options


def main() -> None:
    options = arguments()
    end = time.monotonic() + options.budget
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs the same path at a tiny size")
    device = Device(options.device)
    result: dict[str, Any] = {"machine": device.facts(), "rows": [], "scaling": [], "dropped": []}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), flush=True)
    install()
    try:
        if device.kind == "cpu" and (fault := interpreter_fault()):
            result["absent"] = fault
        inputs = {size: inputs_of(device.kind, *size) for size in SIZES[device.kind]}
        sweep_scaling(device, inputs, result)
        sweep_tiles(device, inputs, end, result)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc(limit=3)
        result["stopped"] = f"stopped by {one_line(error)}"  # type: ignore[arg-type]
    path = saved(result)
    for table in tables(result):
        print(f"\n{console(table)}")
    if result["dropped"]:
        print(f"\nDropped, no time left: {'; '.join(result['dropped'])}.")
    print(f"written: {path}")
    if found := failures(result):
        sys.exit("; ".join(found))
    if not result["rows"]:
        sys.exit("no tile was measured: the budget is too small")


if __name__ == "__main__":
    main()
