"""Compiles every dense kernel for GPUs that need not be there, and prints as JSON what the machine code holds.

Run as a script, in a process where Triton's interpreter is off: `python tests/kernels/compile_report.py`. One line a
kernel: registers, spilled and stack bytes, and its global loads and stores by width in bits.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pocl_fast.kernels import dense
from pocl_fast.kernels.divergence import FAMILIES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
V = 151936
DIVISIBLE = ("V_S", "V", "student_stride_n", "teacher_stride_n", "grad_stride_n")
POINTERS = (
    "student_ptr",
    "teacher_ptr",
    "labels_ptr",
    "temperature_ptr",
    "alpha_ptr",
    "row_scale_ptr",
    "stats_ptr",
    "grad_ptr",
)


def source(student: str, teacher: str, family: str, needs_grad: bool) -> tuple[ASTSource, int]:
    """The row kernel as the launcher would specialise it for a vocabulary divisible by 16."""
    block, warps = dense.tile(V)
    kernel = dense._rows_kernel
    types = {
        "student_ptr": f"*{student}",
        "teacher_ptr": f"*{teacher}",
        "labels_ptr": "*i64",
        "grad_ptr": f"*{student}",
        "FAMILY": "constexpr",
        "POWER": "constexpr",
        "NEEDS_GRAD": "constexpr",
        "BLOCK_V": "constexpr",
    }
    signature = {name: types.get(name, "*fp32" if name in POINTERS else "i32") for name in kernel.arg_names}
    constants = {"FAMILY": FAMILIES[family], "POWER": 2, "NEEDS_GRAD": needs_grad, "BLOCK_V": block}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in POINTERS + DIVISIBLE}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned), warps


def cubin_facts(cubin: bytes) -> dict[str, object]:
    """Registers, local memory, and global accesses of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    accesses: dict[str, int] = {}
    for op, modifiers in re.findall(r"\b(LDG|STG)\.([A-Z0-9_.]+)", sass):
        bits = next(
            (width for width in ("256", "128", "64") if re.search(rf"\b{width}\b", modifiers.replace(".", " "))), None
        )
        bits = bits or next((w for w in ("U16", "S16", "U8", "S8") if w in modifiers.split(".")), "32")
        accesses[f"{op}.{bits}"] = accesses.get(f"{op}.{bits}", 0) + 1
    registers, stack, _shared, local = map(int, found.groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    exponentials = len(re.findall(r"\bMUFU\.EX2\b", sass))
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": spills,
        "ex2": exponentials,
        "accesses": accesses,
    }


def main() -> None:
    quick = "--quick" in sys.argv
    architectures = (90,) if quick else (80, 90, 100)
    pairs = [("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"), ("fp32", "bf16")]
    for arch, (student, teacher), family, grad in itertools.product(architectures, pairs, FAMILIES, (True, False)):
        src, warps = source(student, teacher, family, grad)
        compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        facts = {"arch": arch, "student": student, "teacher": teacher, "family": family, "grad": grad, "warps": warps}
        print(json.dumps(facts | cubin_facts(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main()
