"""How a CPU multiplies fp32 matrices: exactly, or with inputs rounded to bf16 where that is faster. The mode holds for
the whole process.

Also which of several ways to multiply is the fastest here, by timing them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

Way = TypeVar("Way", bound=str)
MARGIN = 1.05  # two ways that are closer than this are equally fast: the usual one is taken, so noise flips no choice
ROUNDS = 5  # of which the fastest counts, for others that use the processor only lengthen one


def least_seconds(ways: Mapping[Way, Callable[[], object]], budget: float) -> dict[Way, float]:
    """The least processor time of each way on one core, in seconds, done in turns: a first round that is not counted,
    for oneDNN makes its code then, and up to `ROUNDS` more while `budget` seconds are not over, but two at least.

    Several threads wait for each other, and one that waits for a core behind another program stops all: two ways on two
    busy cores differed by a factor of 3, now one and now the other. The time of one thread does not count such waits.
    """
    found: dict[Way, float] = {way: float("inf") for way in ways}
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count in range(1 + ROUNDS):
            if count > 2 and time.perf_counter() - start > budget:
                break
            for way, work in ways.items():
                before = time.thread_time()
                work()
                if count > 0:
                    found[way] = min(found[way], time.thread_time() - before)
    finally:
        torch.set_num_threads(threads)
    return found


def faster(seconds: Mapping[Way, float], usual: Way) -> Way:
    """The fastest way; the usual one where that is not faster by more than `MARGIN`."""
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds[usual] > MARGIN * seconds[best] else usual


def matmul_inputs(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """On a CPU, within this context fp32 matrix products may round their inputs to `dtype`, where that is bf16 and the
    processor multiplies it faster; fp16 has more digits than that and is multiplied as fp32. What the user has chosen
    for fp32 stays for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return fp32_products("bf16" if dtype == torch.bfloat16 else "ieee")


@contextlib.contextmanager
def fp32_products(mode: str) -> Iterator[None]:
    """A CPU's products of fp32 tensors are computed in this mode within it: see `set_fp32_products`."""
    before = set_fp32_products(mode)
    try:
        yield
    finally:
        set_fp32_products(before)


@functools.cache
def rounds_to_bf16() -> bool:
    """Whether a CPU rounds fp32 inputs in mode "bf16". Without units that multiply bf16 matrices (AMX) oneDNN does not:
    its products are exact then, and on AMD processors twice as fast as MKL's, which torch takes otherwise."""
    torch_rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=torch_rng)
    with fp32_products("bf16"):
        product = (a @ b).double()
    want = a.double() @ b.double()
    return bool((product - want).norm() > 1e-5 * want.norm())  # rounded inputs give 2e-3, exact ones 3e-7


def set_fp32_products(mode: str) -> str:
    """Sets for the process how a CPU multiplies fp32 tensors: "ieee" exactly, "bf16" with inputs rounded where that is
    faster. What was set before, which this function takes back too."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before: str = settings.fp32_precision
    settings.fp32_precision = mode
    return before
