"""Runs the reports of this folder, each in a process where Triton's interpreter is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def start(script: str, folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> list[dict]:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def in_halves(script: str, folder: Path, *words: str) -> list[dict]:
    halves = [start(script, folder, part, "2", *words) for part in "01"]
    return [kernel for half in halves for kernel in finish(half)]
