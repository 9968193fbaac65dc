"""A model, not a measurement: what the fused loss should take on an H200, from the machine code compiled for it.

It was compared with no GPU yet. It serves to tell, when one can be had, whether a time is what the code asks for.

The dense kernel of each divergence is compiled for sm_90 ahead of time, as tests/kernels/compile_report.py does, for
bf16 logits. A pass is a loop over both rows. Of its machine code a model follows the path that nearly every tile of an
ordinary row takes: the shortest path from the loop's head back to it that has the exponentials of the formula
(`EXPONENTIALS`). So CE's exponentials at a temperature of its own are counted. Not counted is what is branched around:
the mask of the last tile, the label's entry, infinite logits ("careful") and distributions near each other ("close").
A predicated instruction counts, for it takes an issue slot. A thread holds `vec` neighbours of a row and takes the path
once for them, so a logit costs the path's instructions over `vec`.

Of each pass four times are computed, and the longest is taken, tile by tile:
- issue: a multiprocessor starts 128 thread-instructions a clock;
- special: its special-function units (exponential, logarithm, reciprocal) do 16 operations a clock;
- bytes: what is read from and written to DRAM, at the speed of a large copy;
- latency: a program reads some tiles ahead, and so many tiles take no less than a load's latency, that of the L2 or of
  DRAM.
The later passes find in the L2 what its size holds of the rows in flight. A row adds the first load of each pass and
the reductions over its lanes. Both ways to read ahead are modelled (`tiles.Tile.stages`): by hand, one tile, and by the
compiler's asynchronous copies, stages - 1 tiles; their barriers cost nothing here. The kernels that sum the losses and
scale the gradient are left out. The constants below are round figures of published measurements of H100 and H200; the
range of a prediction is that of clock, latency and the share of the slots that a loop fills.

    python benchmarks/model_gpu.py [--results FOLDER]      writes modelled-h200.json there (benchmarks/results)
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: nothing is compiled under its interpreter

import triton  # noqa: E402
from compile_report import Loop, cases, cubin_facts, loops_of, read, source  # noqa: E402
from device import machine  # noqa: E402
from results import RESULTS  # noqa: E402
from table_form import console  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from pocl_fast.system.files import write_json  # noqa: E402

N, V = 8192, 151936  # bf16, with CE, at temperature 1.33
LOGIT_BYTES = 2

# The H200.
MULTIPROCESSORS = 132
ISSUED_A_CLOCK = 128  # thread-instructions: four warps' worth
SPECIAL_A_CLOCK = 16
REGISTERS = 65536  # a multiprocessor's
SHARED_BYTES = 227 * 1024  # of a multiprocessor
MOST_THREADS = 2048  # of a multiprocessor
COPY_BYTES_A_SECOND = 4.3e12  # measured by a large copy on the machine that can be had; the data sheet says 4.8
L2_BYTES = 60e6
ROW_JOIN_US = 1.0  # the reductions over the lanes of a program, once a row


class Conditions(NamedTuple):
    """What is not known before it is measured."""

    clock_GHz: float
    dram_us: float  # a load's latency under load
    l2_us: float
    achieved: float  # share of the issue slots and special-function units that a loop can fill


LIKELY = Conditions(1.98, 0.8, 0.3, 0.9)
BEST = Conditions(1.98, 0.65, 0.25, 1.0)
WORST = Conditions(1.755, 1.0, 0.35, 0.85)

# Exponentials a logit of a pass: CE, q and p, and 3 a thread to move its sums to a new maximum; the larger of p and q
# and their ratio; CE, q, and p or the ratio, of which reverse KL and TVD need neither.
NORMALISERS, MEASURE = 3, 2
GRADIENT = {"forward_kl": 3, "reverse_kl": 2, "jsd": 3, "skew_forward_kl": 3, "skew_reverse_kl": 3, "tvd": 2}
KL = ("forward_kl", "reverse_kl")
STAGES = (0, 4)  # of which tables are made: read ahead by hand, and by the compiler


class Pass(NamedTuple):
    """What a pass asks for, a logit."""

    name: str
    instructions: float
    special: float


class Kernel(NamedTuple):
    """A divergence's kernel, as compiled."""

    divergence: str
    registers: int
    lanes: int
    vec: int
    programs: int  # that a multiprocessor runs at a time
    ahead: int  # tiles of each row that a program reads before it needs them
    passes: list[Pass]


# ---- from machine code to counts ----


def hot_path(loop: Loop, exponentials: int) -> tuple[int, int] | None:
    """Instructions and special-function operations of the shortest path with so many exponentials; None: there is no
    such path."""
    best: list[dict[int, tuple[int, int]]] = [{} for _ in range(len(loop.code) + 1)]  # by exponentials up to there
    best[0][0] = (0, 0)
    for place, instruction in enumerate(loop.code):
        unconditional = instruction.startswith("BRA") and place in loop.branches
        following = [loop.branches[place]] if place in loop.branches else []
        if not unconditional:
            following.append(place + 1)
        for count, (length, special) in best[place].items():
            count += "MUFU.EX2" in instruction
            reached = (length + 1, special + ("MUFU." in instruction))
            for after in following:
                best[after][count] = min(best[after].get(count, reached), reached)
    return best[-1].get(exponentials)


def passes_of(divergence: str, sass: str, vec: int) -> list[Pass]:
    """The passes of an ordinary row. The loops over both rows come in this order: normalisers, the same for infinite
    logits, D unless a KL has it already, gradient; between them those over entries that only the student has."""
    loops = [loop for loop in loops_of(sass) if sum("MUFU.EX2" in line for line in loop.code) >= 2 * vec]
    wanted = {"normalisers": NORMALISERS * vec + 3, "careful": None, "D": MEASURE * vec}
    if divergence in KL:
        del wanted["D"]
    wanted["gradient"] = GRADIENT[divergence] * vec
    if len(loops) != len(wanted):
        raise SystemExit(
            f"{divergence}: {len(loops)} loops over both rows, not {len(wanted)}: the model is out of date"
        )
    passes = []
    for (name, exponentials), loop in zip(wanted.items(), loops, strict=True):
        if exponentials is None:
            continue
        found = hot_path(loop, exponentials)
        if found is None:
            raise SystemExit(f"{divergence}, {name}: no path has {exponentials} exponentials: the model is out of date")
        passes.append(Pass(name, found[0] / vec, found[1] / vec))
    return passes


def compiled(case: dict[str, Any], stages: int) -> Kernel:
    kernel, tile = source(case, stages)
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True}
    made = triton.compile(kernel, target=GPUTarget("cuda", case["arch"], 32), options=options)
    cubin, shared = made.asm["cubin"], made.metadata.shared
    sass = read("nvdisasm", "-c", "--no-dataflow", cubin=cubin)
    if ("LDGSTS" in sass) != (stages > 1):
        raise SystemExit(f"with {stages} stages the kernel does not read ahead as expected: the model is out of date")
    registers = cubin_facts(cubin)["registers"]
    assert isinstance(registers, int)
    threads = 32 * tile.num_warps
    programs = min(MOST_THREADS // threads, REGISTERS // (math.ceil(registers / 8) * 8 * threads))
    programs = min(programs, SHARED_BYTES // max(1, shared))
    passes = passes_of(case["family"], sass, tile.vec)
    return Kernel(case["family"], registers, tile.lanes, tile.vec, programs, max(1, stages - 1), passes)


# ---- from counts to times ----


def in_L2(kernel: Kernel) -> float:
    """Share of both rows that a later pass finds there: it starts where the one before it ended."""
    in_flight = MULTIPROCESSORS * kernel.programs * V * 2 * LOGIT_BYTES
    return min(1.0, L2_BYTES / in_flight)


def dram_bytes(kernel: Kernel, number: int) -> float:
    """Of pass `number`, a logit: two logits read, and in the last pass one written."""
    missed = 1.0 if number == 0 else 1.0 - in_L2(kernel)
    return 2 * LOGIT_BYTES * missed + LOGIT_BYTES * (number == len(kernel.passes) - 1)


def bounds(kernel: Kernel, conditions: Conditions) -> dict[str, float]:
    """ms of all rows if nothing but the one resource took time; and what is predicted."""
    tile_logits = kernel.lanes * kernel.vec
    clocks_a_us = 1e3 * conditions.clock_GHz
    rounds = math.ceil(N / (MULTIPROCESSORS * kernel.programs))  # rows that a program's place computes in turn
    tiles = rounds * V / tile_logits / 1e3  # of a place; thousands, so that µs a tile become ms
    total = dict.fromkeys(("issue", "special", "bytes", "latency", "predicted"), 0.0)
    for number, each in enumerate(kernel.passes):
        issue = each.instructions * tile_logits * kernel.programs / (ISSUED_A_CLOCK * clocks_a_us)
        special = each.special * tile_logits * kernel.programs / (SPECIAL_A_CLOCK * clocks_a_us)
        computing = max(issue, special) / conditions.achieved
        moving = 1e3 * N * V * dram_bytes(kernel, number) / COPY_BYTES_A_SECOND
        hit = 0.0 if number == 0 else in_L2(kernel)
        near, far = conditions.l2_us / kernel.ahead, conditions.dram_us / kernel.ahead  # a tile's latency
        latency = hit * near + (1 - hit) * far
        tile_us = hit * max(computing, near) + (1 - hit) * max(computing, far)
        total["issue"] += issue * tiles
        total["special"] += special * tiles
        total["bytes"] += moving
        total["latency"] += latency * tiles
        total["predicted"] += max(tile_us * tiles, moving)
    row_us = len(kernel.passes) * conditions.dram_us + ROW_JOIN_US
    total["predicted"] += rounds * row_us / 1e3
    return total


def floor_ms() -> float:
    """6 bytes a logit at the speed of a copy: both logits read once, the gradient written."""
    return 3e3 * LOGIT_BYTES * N * V / COPY_BYTES_A_SECOND


def row_of(kernel: Kernel) -> list[Any]:
    likely = bounds(kernel, LIKELY)
    best, worst = (bounds(kernel, conditions)["predicted"] for conditions in (BEST, WORST))
    return [
        f"{kernel.divergence}+CE",
        kernel.registers,
        " + ".join(f"{each.instructions:.1f}" for each in kernel.passes),
        round(sum(each.special for each in kernel.passes), 2),
        *(round(likely[name], 2) for name in ("issue", "special", "bytes", "latency", "predicted")),
        f"{best:.1f} to {worst:.1f}",
        f"{100 * floor_ms() / likely['predicted']:.0f} %",
        f"{100 * floor_ms() / max(likely['issue'], likely['special'], likely['bytes']):.0f} %",
    ]


def table(kernels: list[Kernel], how: str) -> dict[str, Any]:
    """In the form that results.py renders."""
    return {
        "title": f"The fused loss at {N} x {V}, bf16, with CE, at a temperature: {how}",
        "claim": "A model of the machine code. It was compared with no measurement when it was made.",
        "columns": [
            "objective",
            "registers",
            "instructions a logit, by pass",
            "special operations a logit",
            "issue ms",
            "special ms",
            "bytes ms",
            "latency ms",
            "predicted ms",
            "range ms",
            "share of the floor",
            "share at most",
        ],
        "rows": [row_of(kernel) for kernel in kernels],
        "note": [],
    }


def notes() -> list[str]:
    return [
        f"The floor is 6 bytes a logit at {COPY_BYTES_A_SECOND / 1e12:.1f} TB/s: {floor_ms():.2f} ms.",
        "Issue, special, bytes and latency: what the kernel would take if nothing else took time. They overlap in part,"
        " pass by pass.",
        "Share at most: if the latency were hidden and every issue slot filled, with these instructions.",
        f"Predicted: at {LIKELY.clock_GHz} GHz, {LIKELY.dram_us} µs for a load from DRAM, {LIKELY.achieved:.0%} of the"
        f" slots filled. The range: from {BEST.clock_GHz} GHz, {BEST.dram_us} µs, {BEST.achieved:.0%} to"
        f" {WORST.clock_GHz} GHz, {WORST.dram_us} µs, {WORST.achieved:.0%}.",
        "The method is in `benchmarks/model_gpu.py`.",
    ]


def plain_cases() -> list[dict[str, Any]]:
    """Of the compile report: bf16 with gradient, the rows aligned, no transform, a case a divergence."""
    plain = {"arch": 90, "V": V, "student": "bf16", "teacher": "bf16", "grad": True, "transform": False}
    plain |= {"ragged": False, "debug": False}
    return [case for case in cases() if all(case[name] == value for name, value in plain.items())]


def model() -> dict[str, Any]:
    """A table of each way to read ahead, and what is predicted of the one that is launched."""
    launched = {case["family"]: source(case)[1].stages for case in plain_cases()}
    tables, predicted = [], {}
    for stages in sorted({*STAGES, *launched.values()}):
        kernels = [compiled(case, stages) for case in plain_cases()]
        how = f"by the compiler, {stages - 1} tiles ahead (stages {stages})" if stages else "by hand, a tile ahead"
        chosen = [kernel for kernel in kernels if launched[kernel.divergence] == stages]
        which = "as it is launched" if chosen else "not what is launched"
        tables.append(table(kernels, f"read {how}; {which}"))
        predicted |= {f"{kernel.divergence}+CE": bounds(kernel, LIKELY)["predicted"] for kernel in chosen}
    tables[-1]["note"] = notes()
    return {"N": N, "V": V, "predicted_ms": predicted, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    options = parser.parse_args()
    facts, made = machine("cpu"), model()
    here = {name: facts[name] for name in ("torch", "triton", "python", "commit", "date")}
    result = {"modelled": True, "machine": {"device": "NVIDIA H200", **here}, "sections": {"model": made}}
    print("A MODEL, compared with no GPU yet:", ", ".join(f"{name} {value}" for name, value in here.items()))
    for each in made["tables"]:
        print(f"\n{console(each)}")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "modelled-h200.json"
    write_json(path, result)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
