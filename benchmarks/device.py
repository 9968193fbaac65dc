"""The machine that a benchmark runs on: what it is, how a run is timed there, and where the result goes.

Used by the benchmarks that also run on a GPU. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from gpu_run import installed

from pocl_fast.system.files import write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("triton", "transformers", "accelerate", "numpy", "flash-attn", "liger-kernel")


class Device:
    """A GPU, or the CPU in its place: how to time a run and what it took."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "cuda":
            L2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
            self.flush = torch.empty(max(2 * L2, 256 << 20), dtype=torch.int8, device="cuda")
        megabytes = 1024 if kind == "cuda" else 32
        source = torch.zeros(megabytes << 20, dtype=torch.int8, device=kind)
        target = torch.zeros_like(source)
        times = [self.milliseconds(lambda: target.copy_(source)) for _ in range(12)]
        self.copy_bytes_a_second = 2e3 * source.numel() / statistics.median(times[2:])

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """The GPU's own time: it is kept busy until the host has queued what a host can queue."""
        if self.kind == "cpu":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # cycles, about 1 ms
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def clear(self) -> None:
        """Gives unused memory back, so that no side runs in the fragments that another left."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """The most memory that was allocated during a run beyond what was before."""
        if self.kind == "cpu":
            run()
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, Any]:
        return machine(self.kind) | {"copy_GB_a_second": self.copy_bytes_a_second / 1e9}


def machine(kind: str) -> dict[str, Any]:
    """The device, the versions of what runs on it, the commit and the date, for a result to name."""
    facts: dict[str, Any] = {"device": cpu_name(), "torch": torch.__version__}
    if kind == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts |= {package: installed(package) for package in PACKAGES}
    facts["python"] = platform.python_version()
    facts["commit"] = os.environ.get("POCL_COMMIT") or output_of(
        "git", "-C", str(ROOT), "describe", "--always", "--dirty"
    )
    facts["date"] = datetime.now(timezone.utc).isoformat(timespec="minutes")
    return facts


def cpu_name() -> str:
    """The processor's model, and how many of its threads are here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = [tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line]
    known = dict(reversed(pairs))  # the first processor's
    name = known.get("model name", platform.machine())
    if "cpu family" in known:  # a virtual machine may call every generation by one name
        name += f" (family {known['cpu family']}, model {known.get('model', '?')})"
    return f"CPU, {name}, {os.cpu_count()} threads"


def output_of(*command: str) -> str:
    """What a command prints, or "unknown" where it fails or is not here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def save(result: dict[str, Any], name: str) -> Path:
    """Writes `name` into OUT, or benchmarks/out; whole or not at all, for a time limit may end the writer."""
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    write_json(path, result)
    return path
