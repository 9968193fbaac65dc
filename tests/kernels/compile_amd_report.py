"""Compiles the dense kernel for an AMD GPU that need not be there: `python compile_amd_report.py gfx942 64`.

The words: architecture, and its threads a warp. Prints a line of JSON a family, in bf16 with gradient: registers,
spilled ones, bytes of private memory, and 128-bit loads and stores.
"""

from __future__ import annotations

import json
import re
import sys

import triton
import triton.language as tl
from compile_report import cases, source
from triton.backends.compiler import GPUTarget

from pocl_fast.kernels import arithmetic, tiles
from pocl_fast.kernels.divergence import FAMILIES


def main() -> None:
    arch, warp = sys.argv[1], int(sys.argv[2])
    tiles.warp_size = lambda: warp
    arithmetic._HAS_FAST = tl.constexpr(False)  # as with a torch for ROCm
    for case in cases()[: len(FAMILIES)]:
        src, tile = source(case | {"arch": 0})
        options = {"num_warps": tile.num_warps, "enable_fp_fusion": True}
        assembly = triton.compile(src, target=GPUTarget("hip", arch, warp), options=options).asm["amdgcn"]
        keys = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        facts = {key: int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0]) for key in keys}
        for access in ("load", "store"):
            facts[access] = len(re.findall(rf"\b(?:global|buffer)_{access}_(?:dwordx4|b128)\b", assembly))
        print(json.dumps({"arch": arch, "family": case["family"], "warps": tile.num_warps} | facts), flush=True)


if __name__ == "__main__":
    main()
