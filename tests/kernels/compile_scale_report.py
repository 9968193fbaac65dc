"""Compiles what scales a gradient for a GPU that need not be there; prints and is run as `compile_report.py`."""

from __future__ import annotations

from compile_report import ITEMSIZE, report
from triton.compiler import ASTSource

from pocl_fast.kernels import dense, tiles

BLOCK_V = 4096  # as `scale_rows_` launches it for rows of 4096 and more


def cases(few: bool = False) -> list[dict[str, object]]:
    """Every dtype, on sm_90."""
    return [{"arch": 90, "dtype": dtype, "debug": False} for dtype in ITEMSIZE]


def source(case: dict) -> tuple[ASTSource, tiles.Tile]:
    """The kernel as its launcher specialises it where rows start at multiples of 16 bytes."""
    kernel = dense._scale_rows_kernel
    types = {"grad_ptr": f"*{case['dtype']}", "upstream_ptr": "*fp32", "BLOCK_V": "constexpr"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = ("grad_ptr", "V", "grad_stride_n")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    src = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK_V": BLOCK_V}, attrs=attributes)
    return src, tiles.Tile(lanes=256, vec=16 // ITEMSIZE[case["dtype"]], num_warps=8)


if __name__ == "__main__":
    report(cases, source)
