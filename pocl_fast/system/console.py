"""What a person sees while a step runs: lines, progress bars, and the time and memory that a step took."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import psutil
import torch
from tqdm import tqdm

from pocl_fast.system import ranks

Item = TypeVar("Item")
Report: TypeAlias = Callable[[int], object]  # called with how many more units of work are done
_ON_A_TERMINAL = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}{timing}{postfix}"
_IN_A_LOG = "{desc}: {n_fmt} of {total_fmt}{unit}{timing}{postfix}"
ON_A_TERMINAL, IN_A_LOG = 1.0, 15.0  # seconds after which a bar is shown again, whether or not more is done
_in_a_log = [IN_A_LOG]


def show_in_logs_every(seconds: float) -> None:
    """Bars in a log file write a line so often, for the rest of the process; a run that is watched writes more."""
    _in_a_log[0] = seconds


def progress_bar(total: int, what: str, unit: str, *, done: int = 0, delay: float = 0) -> tqdm:
    """A bar with speed, elapsed time and time left: redrawn in place on a terminal, a line every 15 s in a log file,
    while work is done that has no units of its own too.

    `unit` is a plural ("steps"). `done` units were done by an earlier process; the speed does not count them. What ends
    within `delay` seconds shows nothing.
    """
    shared: dict[str, Any] = {"total": total, "initial": done, "desc": what, "unit": f" {unit}", "smoothing": 0.1}
    shared["delay"] = delay
    if sys.stderr.isatty():
        return _Bar(bar_format=_ON_A_TERMINAL, dynamic_ncols=True, mininterval=0.5, **shared)
    often = _in_a_log[0]
    return _LogBar(bar_format=_IN_A_LOG, file=_LogLines(), mininterval=often, maxinterval=60, every=often, **shared)


class _Bar(tqdm):
    """tqdm with `{timing}` in its format: what is known of speed and times, and nothing of what is not. It is shown
    again after `every` seconds without a sign of life."""

    _shown = 0.0  # when, by the monotonic clock

    def __init__(self, *args: Any, every: float = ON_A_TERMINAL, **settings: Any) -> None:
        self._over = threading.Event()
        super().__init__(*args, **settings)
        threading.Thread(target=_keep_showing, args=(weakref.ref(self), self._over, every), daemon=True).start()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self._shown = time.monotonic()
        super().display(msg, pos)

    def show_again(self, every: float) -> None:
        """Shows the bar where it was not shown for so many seconds, unless it is closed or still to begin."""
        with self.get_lock():
            due = time.monotonic() - self._shown >= 0.75 * every and self.format_dict["elapsed"] >= (self.delay or 0)
            if due and not self._over.is_set():
                self.refresh(nolock=True)

    def close(self) -> None:
        self._over.set()
        super().close()

    @property
    def format_dict(self) -> dict[str, Any]:
        known = dict(super().format_dict)
        return known | {"timing": _timing(known)}


class _LogBar(_Bar):
    """A bar in a log file, where closing it says nothing that is not in a line already."""

    _said: tuple[Any, ...] = ()

    def show_again(self, every: float) -> None:
        said, self._said = self._said, ()
        super().show_again(every)
        self._said = self._said or said

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if (now := (self.n, self.postfix, msg)) != self._said:
            self._said = now
            super().display(msg, pos)


def _keep_showing(bar: weakref.ref[_Bar], over: threading.Event, every: float) -> None:
    while not over.wait(every / 4):
        if (shown := bar()) is None:
            return
        shown.show_again(every)
        del shown


def _timing(bar: dict[str, Any]) -> str:
    """The end of a bar's line, as in ", 3.6 s/step, 1:12 elapsed, 0:40 left"; `bar` is tqdm's `format_dict`."""
    done = bar["n"] - bar["initial"]
    if done <= 0 or bar["elapsed"] <= 0:
        return f", {minutes(bar['elapsed'])} elapsed" if bar["elapsed"] >= 1 else ""
    rate = bar["rate"] or done / bar["elapsed"]
    parts = [speed(rate, bar["unit"].strip()), f"{minutes(bar['elapsed'])} elapsed"]
    if bar["n"] < bar["total"]:
        parts.append(f"{minutes((bar['total'] - bar['n']) / rate)} left")
    return "".join(f", {part}" for part in parts)


def speed(rate: float, unit: str) -> str:
    """A rate (units a second) for a person: "12 steps/s", and "3.6 s/step" for less than one; `unit` is a plural."""
    value, name = (rate, f"{unit}/s") if rate >= 1 else (1 / rate, f"s/{unit.removesuffix('s')}")
    return f"{value:.1f} {name}" if value < 10 else f"{value:,.0f} {name}"


def minutes(seconds: float) -> str:
    """A duration as "0:07", "12:30" or "1:02:03"."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def duration(seconds: float) -> str:
    """A duration in words: "7.3 s", "12 min 30 s" or "1 h 2 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    value, unit = float(count), 0
    while value >= 1024 and unit < 4:
        value, unit = value / 1024, unit + 1
    return f"{value:,.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}" if unit else f"{count} bytes"


class _LogLines:
    """stderr for a tqdm bar whose states are lines of their own, without the control characters of a redrawn one."""

    def __init__(self) -> None:
        self.stream = sys.stderr

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def shared_progress(total: int, what: str, unit: str, *, delay: float = 0) -> Iterator[Report]:
    """A bar on the first rank, to be called with how many more units all ranks have done; nothing on the others, nor
    of what ends within `delay` seconds."""
    if not ranks.is_first():
        yield lambda _: None
        return
    with progress_bar(total, what, unit, delay=delay) as bar:
        yield lambda more: bar.update(min(more, total - bar.n))  # an estimate of what the others have done
        bar.update(total - bar.n)


def waiting(what: str, unit: str, *, delay: float = 3) -> contextlib.AbstractContextManager[Report]:
    """A bar over one unit of work that cannot say how far it is, as loading a model, where it takes longer than `delay`
    seconds: a sign of life."""
    return shared_progress(1, what, unit, delay=delay)


def watched(items: Sequence[Item], what: str, unit: str, *, delay: float = 3) -> Iterator[Item]:
    """The items, with a bar on the first rank where they take longer than `delay` seconds."""
    with shared_progress(len(items), what, unit, delay=delay) as done:
        for item in items:
            yield item
            done(1)


@contextlib.contextmanager
def in_place_of_tqdm(library: Any, what: str, unit: str) -> Iterator[None]:
    """Has a library's module that has imported tqdm show its way through a list as `watched` does."""
    if (theirs := getattr(library, "tqdm", None)) is None:  # in another version
        yield
        return
    library.tqdm = lambda items, **_: watched(items, what, unit)
    try:
        yield
    finally:
        library.tqdm = theirs


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
