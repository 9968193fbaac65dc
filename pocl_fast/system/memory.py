"""A process's memory: how much it uses, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import ctypes.util

import psutil
import torch

GROWTH = 512 << 20  # bytes of resident memory between two returns


def memory_in_use(device: torch.device) -> int:
    """Bytes: the process's on a CPU, the tensors' peak on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class FreedMemory:
    """Returns to the system what the C library's allocator keeps of freed memory, whenever the process has grown much.

    Every new number of tokens makes oneDNN keep small things between the large blocks of a step, which then cannot be
    joined: 0.1 GB a step otherwise. 50 ms, each time.
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
