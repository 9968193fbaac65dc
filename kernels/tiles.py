"""How a row is cut into tiles, read and written: 16 bytes a thread at a time, so that memory sees 128-bit accesses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pocl_fast.loss.reference import Rows

STATS = tl.constexpr(len(Rows._fields))  # that a row kernel stores of each token; its scaled loss follows them


class Tile(NamedTuple):
    """`lanes` · `vec` logits at a time; a lane is one thread's `vec` neighbours, so its sums need no other thread.

    (Twice as many a thread save 2 of its 50 instructions a logit, and spill.)

    `stages`: how a pass of the dense kernel reads ahead; the sparse one does it by hand whatever is said here.
    0: by hand, one tile of each row ahead, in registers. n >= 1: the compiler pipelines the loop, n - 1 tiles ahead, by
    asynchronous copies into as many tiles of shared memory, which takes two or three barriers a turn and loses what
    POLICY asks of L2. Rows of bf16 and fp16 that are not known to start at multiples of 16 bytes it cannot copy so, and
    reads none of them ahead."""

    lanes: int
    vec: int
    num_warps: int
    stages: int = 0


# Bytes of a pair of rows of which two a multiprocessor stay in L2, by compute capability: A100 has 40 MB for 108
# multiprocessors, H100 50 for 132, B200 126 for 148.
_PAIR_FOR_TWO = {80: 40_000_000 // 216, 90: 50_000_000 // 264, 100: 126_000_000 // 296}


def choose_tile(divergence: str, V: int, student_bytes: int, teacher_bytes: int, capability: int) -> Tile:
    """The tile for rows of V logits of so many bytes each, on a GPU of compute `capability` (90: H100; 0: not NVIDIA).

    Replace it to tune: `distillation_rows` looks it up in this module at each call. So far all divergences have the
    same.

    One program a row, and later passes read the row again: they are served from L2 if the rows in flight fit it. A
    multiprocessor runs two programs of 8 warps, or one of 16: each has at most 128 registers a thread and mostly more
    than 64 (tests/kernels/test_compiled.py). In bf16 on an H100, 50 MB of L2:

    | V      | a pair  | in flight with 8 warps a row | with 16 warps                                          |
    | 32000  | 125 KiB | 264 rows, 34 MB: fits        | 132 rows, 17 MB                                        |
    | 128256 | 501 KiB | 135 MB                       | 68 MB: 74 % of a row are still there for the next pass |
    | 151936 | 594 KiB | 160 MB                       | 80 MB: 62 %                                            |

    Passes alternate in direction, so each starts on what is still there: at 151936 a KL costs 4 + 4 · 0.38 + 2 = 7.5
    bytes a logit instead of 10.
    """
    vec = 16 // min(student_bytes, teacher_bytes)
    fits = _PAIR_FOR_TWO.get(capability // 10 * 10, _PAIR_FOR_TWO[90])
    wanted = 8 if (student_bytes + teacher_bytes) * V <= fits else 16
    warp = warp_size()
    lanes = min(wanted * 32, max(warp, triton.next_power_of_2(triton.cdiv(V, vec))))
    return Tile(lanes, vec, lanes // warp)


def warp_size() -> int:
    """Threads a warp of the current GPU, for which Triton compiles: 64 on AMD's CDNA, 32 on its RDNA and elsewhere."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size if torch.version.hip else 32


@triton.jit
def offsets(LANES: tl.constexpr, VEC: tl.constexpr):
    """Places [LANES, VEC] within a tile."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_tile(
    row, v, lanes, V,
    BLOCK_V: tl.constexpr, RAGGED: tl.constexpr, POLICY: tl.constexpr, PIPELINED: tl.constexpr = False,
):  # fmt: skip
    """The tile at v as it is stored; anything where v + lanes is past V or v below 0.

    RAGGED: V is not a multiple of 16, so the compiler sees no whole vectors in a mask by V: they are read up to a
    multiple of 16, and what is left one by one, in the last tile alone.

    PIPELINED: the compiler moves the whole vectors' load turns ahead of all else, and carries along in registers, a
    copy a turn, whatever the two share: its offsets are the lanes themselves, and its own. (With v + lanes a ragged row
    spilled, up to 960 bytes a thread.) It asks for none below 0."""
    offs = v + lanes
    whole = V
    if RAGGED:
        whole = V // 16 * 16
    if PIPELINED:
        x = tl.load((row + v) + lanes, mask=lanes < whole - v, other=0.0, eviction_policy=POLICY)
    else:
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


@triton.jit
def store_zeros(
    stats_ptr, N, grad_row, V,
    NEEDS_GRAD: tl.constexpr, RAGGED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """An ignored row: its seven stats and its scaled loss, N apart, and its gradient are 0."""
    for j in tl.static_range(STATS + 1):
        tl.store(stats_ptr + j * N, 0.0)
    if NEEDS_GRAD:
        lanes = offsets(LANES, VEC)
        for v in range(0, V, LANES * VEC):
            store_tile(grad_row, v, lanes, tl.zeros([LANES, VEC], tl.float32), V, LANES * VEC, RAGGED)


def outputs(student: torch.Tensor, needs_grad: bool, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Place for a row kernel's seven stats and the scaled losses [8, N], and for its gradient where that is not to go
    to `grad`: [N, V], or [0] if not wanted."""
    stats = torch.empty((STATS.value + 1, len(student)), dtype=torch.float32, device=student.device)
    if grad is None:
        grad = student.new_empty(student.shape if needs_grad else (0,))
    return stats, grad


def loss_and_stats(stats: torch.Tensor, reduced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row kernel wrote [8, N], as the loss, [] or [N], in memory of its own, and the stats [7, N]."""
    return stats[-1].sum() if reduced else stats[-1].clone(), stats[:-1]


def capability_of(device: torch.device) -> int:
    """90 for an H100; 0 for what is not NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
