"""How much memory a piece of code takes at its peak, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


def peak_growth(before: str, then: str) -> int:
    """Bytes by which the peak memory of a process of its own grew in `then`, after `before`; Python source both."""
    code = f"""
from pathlib import Path
import numpy as np
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
{before}
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
start = peak()
{then}
print(peak() - start)
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
