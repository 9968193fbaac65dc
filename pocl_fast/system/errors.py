"""Exceptions that are no bug of the program: wrong input, a request to stop, and the failure of another process."""

from __future__ import annotations

import signal


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do. The CLI prints it without a
    traceback."""


class Interrupted(SystemExit):
    """Training was asked to stop (SIGINT or SIGTERM) and has written a checkpoint. Left alone it ends the process with
    the exit status 128 + the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name}"


class OtherRankFailed(RuntimeError):
    """This rank of torchrun cannot go on because another one failed or ended; that one reports the cause."""


def first_line(error: BaseException, *, named: bool = False) -> str:
    """What an error says, in one line: up to its first item where it begins a list; after its type's name where it is
    `named`."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{name}: {said}" if named else said
