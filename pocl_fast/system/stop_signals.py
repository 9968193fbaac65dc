"""SIGINT and SIGTERM are noted instead of obeyed at once, so that the running step can end and be saved."""

from __future__ import annotations

import signal
from typing import Any

from pocl_fast.system.console import say


class StopSignals:
    """A context that notes the first SIGINT or SIGTERM in `received` (0 before); a second one interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, which alone may set handlers
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        say("stopping: this step ends and a checkpoint is written first; the same signal again (Ctrl-C) stops at once")
