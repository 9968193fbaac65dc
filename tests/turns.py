"""Whether other Python threads run while one is in C++."""

from __future__ import annotations

import threading
import time


def turns_during(worker: threading.Thread) -> int:
    """How often this thread got its turn, a millisecond apart, while the worker ran."""
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    return turns
