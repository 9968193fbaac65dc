"""What a person sees while a step runs: progress bars, and the time and memory it took."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import psutil
import torch
from tqdm import tqdm

from pocl_fast.system import ranks

Report: TypeAlias = Callable[[int], object]  # called with how many more units all ranks have done


def progress_bar(total: int, what: str, unit: str) -> tqdm:
    """A bar with rate and time left: redrawn in place on a terminal, a line every 15 s in a log file."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=f" {unit}", dynamic_ncols=True, mininterval=0.5, smoothing=0.1)
    line = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}\n"
    return tqdm(total=total, desc=what, unit=f" {unit}", bar_format=line, mininterval=15, maxinterval=60, smoothing=0.1)


@contextlib.contextmanager
def shared_progress(total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar on the first rank, to be called with how many more units all ranks have done; nothing on the others."""
    if not ranks.is_first():
        yield lambda _: None
        return
    with progress_bar(total, what, unit) as bar:
        yield lambda more: bar.update(min(more, total - bar.n))  # an estimate of what the others have done
        bar.update(total - bar.n)


def say(text: str) -> None:
    """Prints a line, above a bar that is being drawn."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:  # a log file's bar is lines of its own, which tqdm would repeat
        print(text, flush=True)


@dataclass
class Usage:
    """What a step took."""

    seconds: float = 0.0
    peak_bytes: int = 0  # of this process's memory; of the GPU's where one is used


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
    """Times a block and samples its peak memory, ten times a second."""
    usage = Usage()
    process, stop = psutil.Process(), threading.Event()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def watch() -> None:
        while True:
            usage.peak_bytes = max(usage.peak_bytes, process.memory_info().rss)
            if stop.wait(0.1):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    start = time.perf_counter()
    watcher.start()
    try:
        yield usage
    finally:
        stop.set()
        watcher.join()
        usage.seconds = time.perf_counter() - start
        if on_gpu:
            usage.peak_bytes = torch.cuda.max_memory_allocated()
