"""SIGINT and SIGTERM noted instead of obeyed at once, so that the step in progress ends and is saved."""

from __future__ import annotations

import signal
from typing import Any

from pocl_fast.system.console import say


class Signals:
    """Notes the first SIGINT or SIGTERM within it in `received` (0 before); a second one kills."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's own business
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        say("stopping after this step, a checkpoint is being written (again to stop at once)")
