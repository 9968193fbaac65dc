"""Compiles the sparse kernel for GPUs that need not be there; prints and is run as `compile_report.py`."""

from __future__ import annotations

import itertools

from compile_report import ITEMSIZE, report
from triton.compiler import ASTSource

from pocl_fast.kernels import sparse, tiles
from pocl_fast.kernels.divergence import FAMILIES

ALIGNED = ("student_ptr", "grad_ptr", "student_stride_n", "grad_stride_n")
FLOATS = ("share", "s_scale", "s_softcap")


def cases() -> list[dict[str, object]]:
    """On sm_90 every family in bf16 and fp32, and the most entries there may be; of the rest two families: those of
    the shortest and the longest formulas."""
    plain = {"arch": 90, "student": "bf16", "V": 151936, "K": 64, "ragged": False, "transform": False, "grad": True}
    grid = [plain | {"family": family, "student": s} for family, s in itertools.product(FAMILIES, ("bf16", "fp32"))]
    two = [case for case in grid if case["student"] == "bf16" and case["family"] in ("forward_kl", "jsd")]
    for changes in (
        {"arch": 80}, {"arch": 100}, {"K": 1024}, {"grad": False}, {"transform": True}, {"V": 32000},
        {"V": 50257, "ragged": True}, {"student": "fp16"},
    ):  # fmt: skip
        grid += [case | changes for case in two]
    return grid


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
    report(cases(), source)
