"""Processes for tests, forked from one that has imported what they need: its imports take 6 seconds, a fork none."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "pocl_fast.cli", "pocl_fast.training.trainer"])


class Forked:
    """A process that runs `code`, with what `subprocess.Popen` has of methods. SIGKILL, limits and the exit status are
    those of any process; only its modules are there from the start, and it ends without the interpreter's own end."""

    def __init__(self, code: str, *argv: str, environment: dict[str, str] | None = None) -> None:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        self._errors = tempfile.NamedTemporaryFile("r", encoding="utf-8")  # noqa: SIM115 (closed with this object)
        arguments = (code, list(argv), environment or {}, theirs, self._errors.name)
        self._process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.stdout = os.fdopen(os.dup(ours.fileno()), encoding="utf-8")
        ours.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the process runs on after {timeout} s")
        return self._process.exitcode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What it wrote to stdout that was not read yet, and to stderr, once it has ended."""
        said = self.stdout.read()
        self.wait(timeout)
        self.stdout.close()
        return said, self._errors.read()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(code: str, argv: list[str], environment: dict[str, str], output: Any, errors: str) -> None:
    os.dup2(output.fileno(), 1)
    output.close()
    with open(errors, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["-c", *argv]
    exec(compile(code, "<code of a forked process>", "exec"), {"__name__": "__main__"})
