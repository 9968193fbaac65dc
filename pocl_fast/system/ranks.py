"""The processes (ranks) that `torchrun` starts for one command: this one's number, its share of the work, and exchange.

Without torchrun there is a single process, rank 0 of 1. Does not know models or files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pocl_fast.system.errors import InputError, OtherRankFailed

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # how long a rank waits for slower ones; a rank that ends is noticed at once
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start() -> bool:
    """Joins the group of ranks that torchrun's environment describes, over gloo; on GPUs also over NCCL, and each rank
    takes the GPU of its local rank. Does nothing without torchrun or within a group. Returns whether it joined.

    Raises `InputError` for more ranks than GPUs on a machine that has one.
    """
    if _in_a_group() or not all(name in os.environ for name in _TORCHRUN):
        return False
    backend = "gloo"
    if torch.cuda.is_available():
        local, GPUs = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= GPUs:
            raise InputError(f"torchrun --nproc-per-node: rank {local} of this machine has no GPU, there are {GPUs}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    return True


def stop() -> None:
    """Leaves the group, if there is one."""
    if _in_a_group():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _in_a_group() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _in_a_group() else 1


def is_first() -> bool:
    """Whether this is rank 0, which alone prints, takes locks, and writes the files that all ranks share."""
    return rank() == 0


def barrier() -> None:
    """Returns once every rank has called it. Raises `OtherRankFailed` where one has ended instead."""
    gather(None)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank, each of which must call it; values are pickled.

    Raises `OtherRankFailed` where a rank has ended instead.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(values, value)  # over gloo: a rank that ended is noticed
    except RuntimeError as error:
        raise OtherRankFailed(f"rank {rank()} waited for another rank, which has ended") from error
    return values


def from_first(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone and returns its result on every rank, each of which must call.

    An error of `work` is raised on rank 0; the others raise `OtherRankFailed` with its message. `work` must not wait
    for other ranks.
    """
    if world_size() == 1:
        return work()
    outcome: tuple[Any, str | None] = (None, None)
    failure: Exception | None = None
    if is_first():
        try:
            outcome = (work(), None)
        except Exception as error:
            failure, outcome = error, (None, f"{type(error).__name__}: {error}")
    value, message = gather(outcome)[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise OtherRankFailed(f"rank 0 failed: {message}")
    return value  # type: ignore[no-any-return]


def share(weights: Sequence[float]) -> list[int]:
    """Positions of this rank's items, in order: each item goes, heaviest first, to the rank with the least so far.

    Every item is exactly one rank's; the ranks must give the same weights.
    """
    loads = [0.0] * world_size()
    mine = []
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        least = loads.index(min(loads))
        loads[least] += weights[item]
        if least == rank():
            mine.append(item)
    return sorted(mine)


def _in_a_group() -> bool:
    return dist.is_available() and dist.is_initialized()
