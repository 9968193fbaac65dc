"""Forward KL's kernel waits for memory and JSD's for issue slots, as predicted: the hardware's own counters of both.

Runs Nsight Compute (`ncu`) on this script, which launches each kernel a few times with cross-entropy, temperature 1.33
and gradient on bf16 logits. Counted are launches after the first two, by passes that each begin with empty caches; the
clocks are left as they are. 16 rows a multiprocessor, which has room for one: 16 full waves, so that the start and the
end weigh little, and bytes a logit are those of a larger batch. A counter that this ncu does not know is asked for by
its other name, or left out and named. Without a GPU or ncu it says so and ends with exit status 0.

    python benchmarks/counters_gpu.py [--families forward_kl,jsd] [--rows 2112]
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from device import Device, machine, output_of, save

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective

V = 151936
WAVES, SKIPPED, COUNTED = 16, 2, 2
TRIES, SECONDS = 6, 180  # runs of ncu for a kernel, one more for each counter that is refused; and of a run
INSTALLED = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/nsight-compute-*/ncu", "/usr/local/cuda*/bin/ncu")
FORBIDDEN = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "DriverNotLoaded")  # a machine on which ncu may not count
STALLS = (
    "long_scoreboard", "short_scoreboard", "math_pipe_throttle", "not_selected", "wait", "barrier", "lg_throttle",
    "mio_throttle", "dispatch_stall", "branch_resolving", "no_instruction", "membar", "selected",
)  # fmt: skip
UNITS = {
    **{"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9},
    **{"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12},
}  # to ns and bytes, in case `--print-units base` is not heeded


class Metric(NamedTuple):
    """A counter: our name, the table's line, and its names in ncu, of which the first that is known counts."""

    key: str
    label: str
    names: tuple[str, ...]


def percent(name: str, of: str = "active") -> str:
    return f"{name}.avg.pct_of_peak_sustained_{of}"


METRICS = (
    Metric("duration", "duration, ns", ("gpu__time_duration.sum",)),
    Metric("read", "DRAM bytes read", ("dram__bytes_read.sum", "dram__bytes_op_read.sum")),
    Metric("written", "DRAM bytes written", ("dram__bytes_write.sum", "dram__bytes_op_write.sum")),
    Metric(
        "dram",
        "DRAM throughput, % of peak",
        (percent("dram__throughput", "elapsed"), percent("gpu__dram_throughput", "elapsed")),
    ),
    Metric("l2_hits", "L2 hit rate, %", ("lts__t_sector_hit_rate.pct",)),
    Metric("l2_read_hits", "L2 hit rate of reads, %", ("lts__t_sector_op_read_hit_rate.pct",)),
    Metric("l2", "L2 throughput, % of peak", (percent("lts__throughput", "elapsed"),)),
    Metric("instructions", "instructions, of warps", ("sm__inst_executed.sum", "smsp__inst_executed.sum")),
    Metric("issue", "issue slots busy, %", (percent("smsp__issue_active"), percent("sm__inst_issued"))),
    Metric("xu", "XU pipe (special functions), %", (percent("sm__inst_executed_pipe_xu"),)),
    Metric("fma", "FMA pipe, %", (percent("sm__inst_executed_pipe_fma"), percent("sm__pipe_fma_cycles_active"))),
    Metric("alu", "ALU pipe, %", (percent("sm__inst_executed_pipe_alu"), percent("sm__pipe_alu_cycles_active"))),
    Metric("lsu", "LSU pipe, %", (percent("sm__inst_executed_pipe_lsu"),)),
    Metric("occupancy", "achieved occupancy, %", (percent("sm__warps_active"),)),
    Metric("eligible", "eligible warps a scheduler and cycle", ("smsp__warps_eligible.avg.per_cycle_active",)),
    Metric("registers", "registers a thread", ("launch__registers_per_thread",)),
    Metric("waves", "waves", ("launch__waves_per_multiprocessor",)),
    Metric("spill_reads", "local memory bytes read", ("l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum",)),
    Metric("spill_writes", "local memory bytes written", ("l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum",)),
    Metric("latency", "warp cycles an instruction", ("smsp__average_warp_latency_per_inst_issued.ratio",)),
    *(
        Metric(
            f"stall_{why}", f"  of which {why}", (f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio",)
        )
        for why in STALLS
    ),
)


class NoCounters(Exception):
    """ncu ran and gave none, with the reason."""


# ---- what is counted ----


def launch(family: str, rows: int) -> None:
    """The process that ncu watches: the family's kernel a few times, nothing else under its name."""
    student, teacher = (torch.empty(rows, V, dtype=torch.bfloat16, device="cuda").normal_(std=3) for _ in range(2))
    student.requires_grad_(True)
    labels = torch.randint(0, V, (rows,), device="cuda")
    objective = Objective(family, temperature=1.33, alpha=0.3)  # type: ignore[arg-type]
    for _ in range(SKIPPED + COUNTED):
        distillation_loss(student, teacher, labels, objective, backend="triton")
    torch.cuda.synchronize()


# ---- ncu ----


def find_ncu() -> str | None:
    """On the PATH, or where NVIDIA's packages put it; the newest."""
    if found := shutil.which("ncu"):
        return found
    root = Path("/")
    places = [str(path) for pattern in INSTALLED for path in sorted(root.glob(pattern.lstrip("/")), reverse=True)]
    return places[0] if places else None


def run_ncu(ncu: str, family: str, rows: int, names: list[str]) -> tuple[str, str]:
    """What ncu wrote of these counters, and what it and the kernel's process printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            ncu, "--csv", "--print-units", "base", "--log-file", str(log), "--clock-control", "none",
            "--target-processes", "application-only", "--kernel-name", "regex:^_rows_kernel.*",
            "--launch-skip", str(SKIPPED), "--launch-count", str(COUNTED), "--metrics", ",".join(names),
            sys.executable, __file__, "--child", family, "--rows", str(rows),
        ]  # fmt: skip
        environment = os.environ | {"LC_ALL": "C"}  # digits as Python reads them
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
        except subprocess.TimeoutExpired as error:
            raise NoCounters(f"ncu did not end in {SECONDS} s") from error
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return text, done.stdout + done.stderr


def parse(text: str) -> list[dict[str, float | None]]:
    """The launches in ncu's CSV, which has a row for each counter of each: values by name, in ns, bytes or as they
    are; None where ncu has no value. Empty where there is no table."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, float | None]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            value = number(row["Metric Value"], row.get("Metric Unit") or "")
            launches.setdefault(row["ID"], {})[row["Metric Name"]] = value
    return list(launches.values())


def number(value: str, unit: str) -> float | None:
    try:
        return float(value.replace(",", "")) * UNITS.get(unit, 1)
    except ValueError:  # "n/a": a counter that does not exist, mostly
        return None


def refused(output: str, names: list[str]) -> list[str]:
    """Which counters an error of ncu's names; it writes them as regular expressions."""
    errors = " ".join(line for line in output.splitlines() if "==ERROR==" in line).replace("\\", "")
    return [name for name in names if re.search(rf"\b{re.escape(name.split('.')[0])}\b", errors)]


def count(ncu: str, family: str, rows: int) -> dict[str, Any]:
    """All counters of a kernel: values a launch, the names they were asked by, and those that there are not."""
    result: dict[str, Any] = {"launches": {}, "names": {}, "absent": []}
    pending = {metric.key: list(metric.names) for metric in METRICS}
    for _ in range(TRIES):
        asked = {key: names[0] for key, names in pending.items()}
        text, printed = run_ncu(ncu, family, rows, list(asked.values()))
        launches = parse(text)
        unknown = refused(text + "\n" + printed, list(asked.values()))
        if not launches and not unknown:
            raise NoCounters(reason_of(text + "\n" + printed))
        for key, name in asked.items():
            values = [value for found in launches if (value := found.get(name)) is not None]
            if values:
                result["launches"][key], result["names"][key] = values, name
                del pending[key]
            elif launches or name in unknown:
                result["absent"].append(name)
                pending[key].pop(0)
                if not pending[key]:
                    del pending[key]
        if not pending:
            break
    result["absent"] += [names[0] for names in pending.values()]
    return result


def reason_of(output: str) -> str:
    """The error in what was printed, or its end."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line or "Error" in line]
    return " / ".join(errors[-3:] or lines[-3:] or ["ncu printed nothing"])[:600]


# ---- the result ----


def derived(launches: dict[str, list[float]], logits: int, floor_ms: float) -> dict[str, float]:
    """What the counters say of one logit, and of the time that 6 bytes a logit take at a copy's bandwidth."""
    mean = {key: statistics.mean(values) for key, values in launches.items()}
    made: dict[str, float] = {}
    for key in ("read", "written"):
        if key in mean:
            made[f"DRAM bytes {key} a logit"] = mean[key] / logits
    if "instructions" in mean:
        made["instructions a logit"] = 32 * mean["instructions"] / logits
    if "duration" in mean:
        made["duration, ms"] = mean["duration"] / 1e6
        made["share of the 6-byte floor, %"] = 100 * floor_ms / made["duration, ms"]
    return made


def print_table(kernels: dict[str, dict[str, Any]]) -> None:
    counted = {family: kernel for family, kernel in kernels.items() if "launches" in kernel}
    if not counted:
        return
    print(f"{'':<40}" + "".join(f"{family:>18}" for family in counted))
    lines = {name for kernel in counted.values() for name in kernel["derived"]}
    for name in sorted(lines):
        print_line(name, [kernel["derived"].get(name) for kernel in counted.values()])
    for metric in METRICS:
        values = [kernel["launches"].get(metric.key) for kernel in counted.values()]
        print_line(metric.label, [statistics.mean(found) if found else None for found in values])
    for family, kernel in counted.items():
        if kernel["absent"]:
            print(f"{family}: this ncu has no {', '.join(kernel['absent'])}")


def print_line(label: str, values: list[float | None]) -> None:
    cells = ["absent" if value is None else f"{value:,.2f}" for value in values]
    print(f"{label:<40}" + "".join(f"{cell:>18}" for cell in cells))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU has nothing to count")
    parser.add_argument("--families", default="forward_kl,jsd", help="with commas between")
    parser.add_argument("--rows", type=int, help=f"{WAVES} a multiprocessor")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.families = options.families.split(",")
    if unknown := set(options.families) - set(DIVERGENCES):
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(DIVERGENCES)}")
    return options


def why_not(options: argparse.Namespace, ncu: str | None) -> str | None:
    """Why nothing can be counted here."""
    if options.device == "cpu":
        return "on a CPU there are no GPU counters to read"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if ncu is None:
        return f"Nsight Compute is not here: no ncu on the PATH, nor at {', '.join(INSTALLED)}"
    return None


def main() -> None:
    options = arguments()
    if options.child:
        launch(options.child, options.rows)
        return
    ncu = find_ncu()
    if reason := why_not(options, ncu):
        kind = "cuda" if torch.cuda.is_available() and options.device == "cuda" else "cpu"
        path = save({"machine": machine(kind), "absent": reason}, "counters.json")
        print(f"nothing was counted: {reason}\nwritten: {path}")
        return
    assert ncu is not None
    rows = options.rows or WAVES * torch.cuda.get_device_properties(0).multi_processor_count
    device = Device("cuda")
    floor_ms = 6e3 * rows * V / device.copy_bytes_a_second
    version = (output_of(ncu, "--version").splitlines() or ["unknown"])[-1]
    result: dict[str, Any] = {"machine": device.facts(), "ncu": version, "rows": rows, "V": V, "kernels": {}}
    result["floor_ms"] = floor_ms
    failed = False
    for family in options.families:
        try:
            kernel = count(ncu, family, rows)
            kernel["derived"] = derived(kernel["launches"], rows * V, floor_ms)
        except NoCounters as error:
            kernel = {"no_counters": str(error)}
            failed |= not any(word in str(error) for word in FORBIDDEN)
            print(f"{family}: no counters: {error}")
        result["kernels"][family] = kernel
        path = save(result, "counters.json")
    print(f"{rows} x {V} bf16 logits with gradient, {result['ncu']}")
    print_table(result["kernels"])
    print(f"written: {path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
