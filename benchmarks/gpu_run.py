"""What gpu.sh writes down of a run: the machine and its versions, and how each section ended. `run.json` in OUT.

python benchmarks/gpu_run.py versions --device cuda      what is on this machine; begins a new run.json
python benchmarks/gpu_run.py section NAME SECONDS STATUS one more section, with its exit status
python benchmarks/gpu_run.py missing WHEEL...            those wheels whose packages are not installed here
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENDS = {"0": "done", "124": "ran out of its time", "137": "killed, for want of memory perhaps", "130": "interrupted"}
TOOLS = ("nvcc", "ncu", "g++", "cmake", "ninja", "git")
# what sections use besides torch; absent ones are named, and what needs them is absent
PACKAGES = ("triton", "transformers", "accelerate", "numpy", "pytest", "pytest-xdist", "hypothesis", "peft", "jinja2")
MAY_LACK = ("flash-attn", "liger-kernel", "bitsandbytes", "pyarrow", "trl", "matplotlib")


def run_file() -> Path:
    folder = Path(os.environ["OUT"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "run.json"


def versions(kind: str) -> None:
    """Prints and notes the machine. Raises SystemExit where it has no GPU and one was asked for, or no package that all
    sections need."""
    import torch
    from device import cpu_name, machine

    from pocl_fast import _C
    from pocl_fast.system.files import write_json

    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu runs the same path at tiny sizes")
    facts = machine(kind) | {"C++": f"{_C.isa()}, {Path(_C.__file__).name}"}
    if kind == "cuda":
        facts |= gpu()
    facts["processor"] = cpu_name()
    facts["memory_GiB"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    facts["disk_free_GiB"] = round(shutil.disk_usage(os.environ["OUT"]).free / 2**30)
    facts["tools"] = {tool: "here" if shutil.which(tool) else "missing" for tool in TOOLS}
    facts["packages"] = {name: installed(name) for name in (*PACKAGES, *MAY_LACK)}
    write_json(run_file(), {"machine": facts, "sections": []})
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {text}")


def gpu() -> dict[str, Any]:
    """What torch and nvidia-smi say of the first GPU."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = "pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,mig.mode.current,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        said = f"no nvidia-smi: {error}"
    return {
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "GPU_memory_GiB": round(properties.total_memory / 2**30, 1),
        "L2_MiB": getattr(properties, "L2_cache_size", 0) / 2**20,
        "CUDA": torch.version.cuda,
        query: said,
    }


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def section(name: str, seconds: float, status: str) -> None:
    """Adds a section's end to the run."""
    from pocl_fast.system.files import write_json  # not at the top: it is not placed yet when wheels are looked for

    says = ENDS.get(status, "no time left" if status == "no-time" else "failed")
    known = run_file()
    run = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {"machine": {}, "sections": []}
    others = [one for one in run["sections"] if one["name"] != name]
    this = {"name": name, "seconds": seconds, "status": status, "says": says}
    write_json(known, run | {"sections": [*others, this]})
    print(f"{name}: {says}, {seconds:g} s")


def missing(wheels: list[Path]) -> None:
    """Prints the wheels of packages that are not here, a line each."""
    for wheel in wheels:
        if wheel.is_file() and installed(wheel.name.split("-")[0].replace("_", "-")) == "missing":
            print(wheel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions").add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    ended = commands.add_parser("section")
    ended.add_argument("name")
    ended.add_argument("seconds", type=float)
    ended.add_argument("status")
    commands.add_parser("missing").add_argument("wheels", nargs="*", type=Path)
    options = parser.parse_args()
    if options.command == "versions":
        versions(options.device)
    elif options.command == "section":
        section(options.name, options.seconds, options.status)
    else:
        missing(options.wheels)


if __name__ == "__main__":
    main()
