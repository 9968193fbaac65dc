"""Who may write in a folder at one time: one process, or all ranks of one run.

The lock is the operating system's (flock), on a file in the folder: it ends with the process that holds it, however
that ends. Does not know what is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_NAME_BYTES = 256  # always this many, so that a full disk has room for the next holder's name
_ATTEMPTS, _PAUSE = 100, 0.01  # seconds: another rank is alone in the folder for a moment only


class Writers(NamedTuple):
    """The processes that may write together, each under file numbers of its own: `number % world_size == rank`."""

    rank: int = 0
    world_size: int = 1
    run: str = ""  # the same on all ranks of a run, and on no other's

    @classmethod
    def of_this_run(cls) -> Writers:
        """This process and the other ranks, each of which must call it."""
        return cls(ranks.rank(), ranks.world_size(), ranks.from_first(lambda: uuid.uuid4().hex))

    def next_number(self, last: int) -> int:
        """The first of this rank's numbers after `last`."""
        return last + 1 + (self.rank - last - 1) % self.world_size


def lock_folder(
    folder: Path, writers: Writers, *, what: str, when_alone: Callable[[], None], lacking: str = ""
) -> IO[bytes]:
    """The folder's lock, to be given to `unlock`; `when_alone` is called before any other process can have it.

    Raises `InputError` where another run has it or the folder cannot be written. The message calls the folder by `what`
    it is ("teacher cache") and goes on with `lacking`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        lock = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        why = "is read-only" if error.errno in _READ_ONLY else f"cannot be written: {error.strerror}"
        raise InputError(f"the {what} {folder} {why}{lacking}") from error
    try:
        for _ in range(_ATTEMPTS if writers.world_size > 1 else 1):
            if _joined(lock, writers, when_alone):
                return lock
            time.sleep(_PAUSE if writers.world_size > 1 else 0)
    except OSError as error:
        lock.close()
        raise InputError(f"cannot lock the {what} {folder}: {error.strerror}") from error
    except BaseException:
        lock.close()
        raise
    _, holder = _name(lock)
    lock.close()
    raise InputError(
        f"another process ({holder or 'unknown'}) is writing the {what} {folder}{lacking}: wait for it to end,"
        " or give another --output"
    )


def unlock(lock: IO[bytes]) -> None:
    """Lets the next writer in."""
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone leaves it to a forked process that has the file too
    lock.close()


def _joined(lock: IO[bytes], writers: Writers, when_alone: Callable[[], None]) -> bool:
    """Whether the lock could be had: exclusively by one process, shared by the ranks of the run that is named in it."""
    if _try(lock, fcntl.LOCK_EX):
        when_alone()
        with contextlib.suppress(OSError) if writers.world_size == 1 else contextlib.nullcontext():
            name = f"{writers.run}\nprocess {os.getpid()} on {socket.gethostname()}".encode()
            os.pwrite(lock.fileno(), name[:_NAME_BYTES].ljust(_NAME_BYTES), 0)
        if writers.world_size == 1:
            return True
    if writers.world_size == 1 or not _try(lock, fcntl.LOCK_SH):
        return False
    if _name(lock)[0] == writers.run:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def _try(lock: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name(lock: IO[bytes]) -> tuple[str, str]:
    """The run and the process that have the lock, or had it last."""
    run, _, process = os.pread(lock.fileno(), _NAME_BYTES, 0).decode(errors="replace").partition("\n")
    return run, process.strip()
