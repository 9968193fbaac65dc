"""Compiles the dense kernel for GPUs that need not be there, and prints as JSON what the machine code holds.

Run as a script, in a process where Triton's interpreter is off: `python tests/kernels/compile_report.py`; with `0 2`
and `1 2` each half of the grid, with `0 2 few` half of what every run of the tests takes. One line a kernel: registers,
spilled and stack bytes, global accesses by width in bits (LDGSTS: asynchronous copies into shared memory), of each loop
its instructions and what it asks of the special-function units, bytes of shared memory, and the messages of its
assertions.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pocl_fast.kernels import dense, tiles
from pocl_fast.kernels.divergence import FAMILIES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
ALIGNED = ("student_ptr", "teacher_ptr", "grad_ptr", "student_stride_n", "teacher_stride_n", "grad_stride_n")
FLOATS = ("share", "s_scale", "s_softcap", "t_scale", "t_softcap")


def cases(few: bool = False) -> list[dict[str, object]]:
    """With gradient: on sm_90 every family in bf16, fp16, fp32, and fp32 with a teacher in bf16; on sm_80 and sm_100
    every family in bf16, and of fp16 and fp32 one that puts most into registers. Of the rest, in bf16 on sm_90, every
    family ragged, and every one transformed; two on a short row, and with a teacher in fp32; and without gradient every
    one, fp32 with bf16 too. The last case is compiled for debugging.

    `few`: for sm_90 alone. With gradient every family in bf16, and each once more in another dtype; without, in bf16 a
    KL, a mixture and total variation; of the changes one or two families.

    To keep it short: a kernel takes 3 seconds. (Every family in every dtype on each of the three, and with a teacher in
    fp32, passed, too, when these were chosen.)"""
    plain = {"arch": 90, "V": 151936, "ragged": False, "transform": False, "grad": True, "debug": False}
    dtypes = [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")]
    grid = [plain | {"student": s, "teacher": t, "family": f} for (s, t), f in itertools.product(dtypes, FAMILIES)]
    bf16 = grid[: len(FAMILIES)]
    if few:
        return [
            *bf16,
            *_few(plain, {str(case["family"]): case for case in bf16}),
            bf16[0] | {"grad": False, "debug": True},
        ]
    most = [("fp16", "skew_forward_kl"), ("fp32", "jsd")]
    others = [plain | {"student": dtype, "teacher": dtype, "family": family} for dtype, family in most]
    grid += [case | {"grad": False} for case in grid[: 2 * len(FAMILIES)]]
    grid += [case | {"arch": arch} for arch in (80, 100) for case in (*bf16, *others)]
    for changes in ({"V": 50257, "ragged": True}, {"transform": True}):
        grid += [case | changes for case in bf16]
    for case in (case for case in bf16 if case["family"] in ("forward_kl", "skew_reverse_kl")):
        grid += [case | {"V": 32000}, case | {"teacher": "fp32"}]
    return [*grid, bf16[0] | {"grad": False, "debug": True}]


def _few(plain: dict[str, object], bf16: dict[str, dict[str, object]]) -> list[dict[str, object]]:
    once_more = [
        ("fp32", "bf16", "jsd"), ("fp32", "bf16", "forward_kl"), ("fp32", "fp32", "skew_reverse_kl"),
        ("fp32", "fp32", "reverse_kl"), ("fp16", "fp16", "skew_forward_kl"), ("fp16", "fp16", "tvd"),
    ]  # fmt: skip
    changes: dict[str, list[dict[str, object]]] = {
        "forward_kl": [{"grad": False}, {"V": 50257, "ragged": True}, {"teacher": "fp32"}],
        "reverse_kl": [{"transform": True}],
        "jsd": [{"V": 50257, "ragged": True}],
        "skew_forward_kl": [{"transform": True}],
        "skew_reverse_kl": [{"grad": False}, {"V": 32000}],
        "tvd": [{"grad": False}],
    }
    return [
        *(plain | {"student": s, "teacher": t, "family": family} for s, t, family in once_more),
        *(bf16[family] | change for family, these in changes.items() for change in these),
    ]


def source(case: dict, stages: int | None = None) -> tuple[ASTSource, tiles.Tile]:
    """The row kernel as the launcher specialises it where rows start at multiples of 16 bytes, and V, too, is a
    multiple of 16 unless the case is ragged; with the tile that is chosen, but for `stages` where they are given."""
    kernel = dense._rows_kernel
    sizes = ITEMSIZE[case["student"]], ITEMSIZE[case["teacher"]]
    tile = tiles.choose_tile(case["family"], case["V"], *sizes, case["arch"])
    if stages is not None:
        tile = tile._replace(stages=stages)
    constants = {
        "FAMILY": FAMILIES[case["family"]],
        "POWER": 2,
        "NEEDS_GRAD": case["grad"],
        "HAS_TRANSFORM": case["transform"],
        "RAGGED": case["ragged"],
        "LANES": tile.lanes,
        "VEC": tile.vec,
        "STAGES": tile.stages,
    }
    types = {
        "student_ptr": f"*{case['student']}",
        "teacher_ptr": f"*{case['teacher']}",
        "grad_ptr": f"*{case['student']}",
        "labels_ptr": "*i64",
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(FLOATS, "fp32"),
    }
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    aligned = ALIGNED if case["ragged"] else (*ALIGNED, "V_S", "V")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), tile


def cubin_facts(cubin: bytes) -> dict[str, object]:
    """Registers, local memory, global accesses and loops of a cubin."""
    usage = read("cuobjdump", "-res-usage", cubin=cubin)
    sass = read("nvdisasm", "-c", "--no-dataflow", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, _shared, local = map(int, found.groups())
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "accesses": _accesses(sass),
        "loops": [_counts(loop) for loop in loops_of(sass)],
    }


def read(tool: str, *options: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _accesses(sass: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for op, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)\.([A-Z0-9_.]+)", sass):
        words = modifiers.split(".")
        width = next(
            (word.strip("US") for word in words if word in ("256", "128", "64", "U16", "S16", "U8", "S8")), "32"
        )
        counts[f"{op}.{width}"] = counts.get(f"{op}.{width}", 0) + 1
    return counts


class Loop(NamedTuple):
    """Machine code of an innermost loop, and where its branches go within it: instruction to instruction."""

    code: list[str]
    branches: dict[int, int]


def loops_of(sass: str) -> list[Loop]:
    """The innermost loops, in the order of their ends."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    targets = {}
    for place, instruction in enumerate(code):
        found = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if found and found[1] in labels:
            targets[place] = labels[found[1]]
    loops, innermost = [], -1
    for end, start in targets.items():
        if innermost < start < end:
            innermost = end
            inside = {a - start: b - start for a, b in targets.items() if start <= a < end and start <= b <= end}
            loops.append(Loop(code[start : end + 1], inside))
    return loops


def _counts(loop: Loop) -> dict[str, int]:
    """A loop's instructions, in all and by kind. What is branched around is counted too."""
    kinds = ("MUFU.EX2", "MUFU.LG2", "MUFU.RCP", "LDG", "LDGSTS", "STG", "SHFL", "BAR")
    count = {kind: sum(bool(re.search(rf"\b{kind}\b", line)) for line in loop.code) for kind in kinds}
    return {"all": len(loop.code)} | count


def _assertions(ptx: str) -> list[str]:
    """The messages of the assertions that may fail; a kernel for debugging has Triton's own besides, of overflow."""
    messages = re.findall(r"\bassertMessage_\d+\[\d+\] = \{([\d, ]+)\}", ptx)
    assert bool(messages) == ("call.uni __assertfail" in ptx)
    return [bytes(map(int, message.split(","))).decode().rstrip("\0") for message in messages]


def report(cases: Callable[[bool], list[dict]], source: Callable[[dict], tuple[ASTSource, tiles.Tile]]) -> None:
    """Compiles and prints the part of the cases that the command line names: the first word of how many the second."""
    part, parts = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (0, 1)
    chosen = cases("few" in sys.argv)
    left_out = len(cases(False)) - len(chosen)
    for case in chosen[part::parts]:
        src, tile = source(case)
        options = {"num_warps": tile.num_warps, "enable_fp_fusion": True, "debug": case["debug"]}
        compiled = triton.compile(src, target=GPUTarget("cuda", case["arch"], 32), options=options)
        facts = cubin_facts(compiled.asm["cubin"]) | {"assertions": _assertions(compiled.asm["ptx"])}
        facts |= {"shared": compiled.metadata.shared, "left_out": left_out}
        print(json.dumps(case | {"warps": tile.num_warps, "vec": tile.vec} | facts), flush=True)


if __name__ == "__main__":
    report(cases, source)
