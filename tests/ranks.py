"""Processes of one gloo group on this machine, kept for several tests: starting them costs seconds, a call does not."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import CONTEXT

gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
START, CALL = 120, 120  # seconds: a machine may be busy


class Ranks:
    """`ranks(function, ...)` is the list of what function(...) gives on each rank. Function and values are pickled."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        self.processes, self.pipes = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        self._answers(START)

    def __call__(self, function: Callable[..., Any], *arguments: Any, seconds: float = CALL) -> list[Any]:
        assert self.pipes, "an earlier call left the processes hanging"
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return self._answers(seconds)

    def _answers(self, seconds: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds):
                self.stop()
                raise TimeoutError(f"rank {rank} of {self.world} gave no answer within {seconds} s")
            answers.append(pipe.recv())
        if errors := [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]:
            raise AssertionError("\n".join(errors))
        return [value for value, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
    torch.set_num_threads(1)
    # a file instead of a port, which another program might take
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    pipe.send((None, None))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
