"""Compiles the sparse kernel for GPUs that need not be there; prints and is run as `compile_report.py`."""

from __future__ import annotations

import itertools

from compile_report import ITEMSIZE, report
from triton.compiler import ASTSource

from pocl_fast.kernels import sparse, tiles
from pocl_fast.kernels.divergence import FAMILIES

ALIGNED = ("student_ptr", "grad_ptr", "student_stride_n", "grad_stride_n")
FLOATS = ("share", "s_scale", "s_softcap")


def cases(few: bool = False) -> list[dict[str, object]]:
    """Every family in every dtype on sm_90, and in bf16 on sm_80 and sm_100; of the rest two families: those of the
    shortest and the longest formulas. `few`: on sm_90 alone, fp32 and fp16 of two families each, the rest of one. The
    last case is compiled for debugging."""
    plain = {"arch": 90, "V": 151936, "K": 64, "ragged": False, "transform": False, "grad": True, "debug": False}
    dtypes = ("bf16", "fp32", "fp16")
    grid = [plain | {"student": s, "family": family} for s, family in itertools.product(dtypes, FAMILIES)]
    bf16 = grid[: len(FAMILIES)]
    if few:
        most = {"fp32": ("reverse_kl", "jsd"), "fp16": ("skew_forward_kl", "tvd")}
        grid = [case for case in grid if case in bf16 or case["family"] in most[str(case["student"])]]
    else:
        grid += [case | {"arch": arch} for arch in (80, 100) for case in bf16]
    two = [case for case in bf16 if case["family"] in ("forward_kl", "jsd")]
    changes: list[dict[str, object]] = [
        {"K": 1024}, {"grad": False}, {"transform": True}, {"V": 32000}, {"V": 50257, "ragged": True},
    ]  # fmt: skip
    for n, change in enumerate(changes):
        grid += [case | change for case in (two[n % 2 :: 2] if few else two)]
    return [*grid, two[0] | {"grad": False, "debug": True}]


def source(case: dict) -> tuple[ASTSource, tiles.Tile]:
    """The row kernel as the launcher specialises it where rows start at multiples of 16 bytes."""
    kernel = sparse._sparse_rows_kernel
    size = ITEMSIZE[case["student"]]
    tile = tiles.choose_tile(case["family"], case["V"], size, size, case["arch"])
    constants = {
        "FAMILY": FAMILIES[case["family"]],
        "BUCKET": True,
        "POWER": 2,
        "NEEDS_GRAD": case["grad"],
        "HAS_TRANSFORM": case["transform"],
        "RAGGED": case["ragged"],
        "LANES": tile.lanes,
        "VEC": tile.vec,
        "BLOCK_K": case["K"],
    }
    types = {
        "student_ptr": f"*{case['student']}",
        "grad_ptr": f"*{case['student']}",
        "labels_ptr": "*i64",
        "indices_ptr": "*i32",
        "listed_ptr": "*i32",
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(FLOATS, "fp32"),
    }
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    aligned = ALIGNED if case["ragged"] else (*ALIGNED, "V")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), tile


if __name__ == "__main__":
    report(cases, source)
