"""Whether the `tokenizers` library uses threads: while many texts are tokenised at once, and at no other time.

Its threads do not survive a fork, and a forked process that calls them waits for ever. So the command line turns them
off for the process and all that it forks. Does not know tokenizers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_VARIABLE = "TOKENIZERS_PARALLELISM"  # read by the library at each call
_off_in: set[int] = set()  # the process that turned them off, and whose user had not said otherwise


def turn_off() -> None:
    """No threads in this process but within `on`; a user's own setting stays as it is."""
    if _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = "false"
    _off_in.add(os.getpid())
    os.register_at_fork(after_in_child=_stay_off)


@contextlib.contextmanager
def on() -> Iterator[None]:
    """Threads for one call, in the process that turned them off. Elsewhere the library's own rules hold."""
    if os.getpid() not in _off_in:
        yield
        return
    os.environ[_VARIABLE] = "true"
    try:
        yield
    finally:
        os.environ[_VARIABLE] = "false"


def _stay_off() -> None:
    """In a forked process, also one of a fork within `on`."""
    _off_in.clear()  # a process may get the number of one that ended
    os.environ[_VARIABLE] = "false"
