"""A process's memory: how much it uses, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import ctypes.util

import psutil
import torch

GROWTH = 512 << 20  # bytes of resident memory between two returns


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: the process's resident memory on a CPU, the peak of allocated tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class FreedMemory:
    """Gives back to the system what the C library's allocator keeps of freed memory, whenever the process has grown.

    oneDNN keeps small blocks for every new number of tokens. They lie between the large blocks of a step, which the
    allocator then cannot join: without this a process grows by 0.1 GB a step. It takes 50 ms each time.
    """

    def __init__(self) -> None:
        name = ctypes.util.find_library("c")
        self._trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None  # glibc's alone
        self._process = psutil.Process()
        self._floor = self._process.memory_info().rss

    def return_if_grown(self) -> None:
        """To be called between steps."""
        if self._trim is not None and self._process.memory_info().rss > self._floor + GROWTH:
            self._trim(0)
            self._floor = self._process.memory_info().rss
