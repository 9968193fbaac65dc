"""How a row is cut into tiles, read and written: 16 bytes a thread at a time, so that memory sees 128-bit accesses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """`lanes` · `vec` logits at a time; a lane is one thread's `vec` neighbours, so its sums need no other thread.

    (Twice as many a thread save 2 of its 50 instructions a logit, and spill.)"""

    lanes: int
    vec: int
    num_warps: int


def choose_tile(V: int, itemsize: int, capability: int) -> Tile:
    """The tile for rows of V logits whose smaller dtype has `itemsize` bytes, on a GPU of compute `capability` (90:
    H100; 0: not NVIDIA). Replace it to tune: `distillation_rows` looks it up in this module at each call.

    One program a row, and later passes read the row again: they are served from L2 if the rows in flight fit it. A pair
    of bf16 rows has 4·V bytes, and a multiprocessor runs 65536 / (32 · warps · registers) programs, registers being 65
    to 128 (tests/kernels/test_compiled.py): two of 8 warps, one of 16.

    | V       | pair    | in flight on H100 (132 multiprocessors, 50 MB of L2)                              |
    | 32000   | 125 KiB | 8 warps: 264 rows, 32 MiB: fits, and one program's end hides behind the other     |
    | 128256  | 501 KiB | 8 warps: 129 MiB; 16 warps: 132 rows, 65 MiB: the last 77 % of the row still there |
    | 151936  | 594 KiB | 8 warps: 153 MiB; 16 warps: 132 rows, 77 MiB: 65 %                                |

    Passes alternate in direction, so each starts on what is still there: at 151936 a KL costs 4 + 4 · 0.35 + 2 = 7.4
    bytes a logit instead of 10. A100 has 108 multiprocessors and 40 MB, B200 148 and 126 MB: there 8 warps fit longer.
    """
    vec = 16 // itemsize
    fits = 65536 if capability < 100 else 131072  # the longest rows of which two a multiprocessor stay in L2
    wanted = 8 if fits >= V else 16
    warp = 64 if torch.version.hip else 32
    lanes = min(wanted * 32, max(warp, triton.next_power_of_2(triton.cdiv(V, vec))))
    return Tile(lanes, vec, lanes // warp)


@triton.jit
def offsets(LANES: tl.constexpr, VEC: tl.constexpr):
    """Places [LANES, VEC] within a tile."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_tile(row, v, lanes, V, BLOCK_V: tl.constexpr, RAGGED: tl.constexpr, POLICY: tl.constexpr):
    """The tile at v as it is stored; anything where v + lanes is past V or v below 0.

    RAGGED: V is not a multiple of 16, so the compiler sees no whole vectors in a mask by V: they are read up to a
    multiple of 16, and what is left one by one, in the last tile alone."""
    offs = v + lanes
    whole = V
    if RAGGED:
        whole = V // 16 * 16
    x = tl.load(row + offs, mask=(offs >= 0) & (offs < whole), other=0.0, eviction_policy=POLICY)
    if RAGGED:  # noqa: SIM102 (the outer is decided when compiling, the inner is data)
        if (v < V) & (v + BLOCK_V > whole):
            x = tl.where(offs < whole, x, tl.load(row + offs, mask=(offs >= whole) & (offs < V), other=0.0))
    return x


@triton.jit
def store_tile(row, v, lanes, x, V, BLOCK_V: tl.constexpr, RAGGED: tl.constexpr):
    """Writes the tile at v, up to V; not to be kept in L2, where what is read again should stay."""
    offs = v + lanes
    x = x.to(row.dtype.element_ty)
    whole = V
    if RAGGED:
        whole = V // 16 * 16
    tl.store(row + offs, x, mask=offs < whole, eviction_policy="evict_first")
    if RAGGED:  # noqa: SIM102
        if v + BLOCK_V > whole:
            tl.store(row + offs, x, mask=(offs >= whole) & (offs < V))
