"""Keeps the results of benchmark runs in benchmarks/results, and makes docs/benchmarks.md of them.

    python benchmarks/results.py keep FOLDER [--name NAME]     the JSON files of one run's OUT into one file
    python benchmarks/results.py docs [--check]                the page; --check: exit status 1 if it is not up to date

Both take --results FOLDER, and docs takes --page FILE. A kept file is

    {"machine": {"device", "commit", "date", versions}, "run": [{"name", "seconds", "status", "says"}],
     "sections": {name: result}}

`run` is what benchmarks/gpu.sh says of its sections; a result that was made without it has none. A file with
"modelled": true holds predictions, and the page keeps them apart. The results of smoke, loss and training are shown in
tables made for them. Any other is a table of this form, or several of them as {"tables": [...]} (see table_form.py):

    {"title": str, "claim": str, "columns": [...], "rows": [[...]], "note": str}

What has neither form is shown as it is: numbers in a list, lists of records as tables. Needs nothing but this package.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

import loss_gpu_report
from results_tables import section_tables
from table_form import Table, cell, is_table, markdown, wrapped

from pocl_fast.system.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
SECTIONS = ("smoke", "loss", "sweep", "training", "counters", "linear")  # that benchmarks/gpu.sh has, as it runs them
RUN = "run.json"
SAME = ("device", "commit", "torch")  # of the machine, in all results of one run
Result = dict[str, Any]

TOP = """# Benchmarks

This page is made from the files in `benchmarks/results/` by `python benchmarks/results.py docs`. Do
not edit it.

A benchmark runs pocl-fast and other ways to compute the same on one machine, in one process, on the
same tensors, in turns. "ours" is pocl-fast. A ratio over ours is another side's time (or memory)
divided by ours: 2.0x means that ours takes half of it. Each result names the device, the versions,
the commit and the date. A section that failed, and a side that is wrong, absent, or was dropped for
want of time, is named and not left out.

To measure on a machine with an NVIDIA GPU: run `bash benchmarks/gpu.sh`, which takes 8 minutes,
then `python benchmarks/results.py keep FOLDER` with the folder of its results, then
`python benchmarks/results.py docs`. `bash benchmarks/gpu.sh tests` runs the GPU tests. Where that
machine has no network, run `bash benchmarks/prepare_gpu.sh` on another one first and copy the tree.
`--device cpu` runs the same path without a GPU, at tiny sizes."""
NO_GPU = 'No GPU has been measured yet: everything under "Modelled" is a prediction.'
MODELLED = """## Modelled

Nothing here was measured. A model reads the compiled machine code, counts what a GPU has to do, and
predicts its time."""


# ---- keeping ----


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path} is not JSON: {error}")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def section_of(path: Path, machine: dict[str, Any]) -> Result | None:
    """A result of the run, its machine reduced to what the run's does not say; None: it is no result."""
    content = read_json(path)
    known = path.stem in SECTIONS and isinstance(content, dict)
    if not known and not is_table(content) and not (isinstance(content, dict) and "tables" in content):
        return None
    own = content.pop("machine", {})
    if not isinstance(own, dict):
        sys.exit(f"{path}: its machine is no record, but {own!r}")
    for name in SAME:
        if name in own and own[name] != machine[name]:
            sys.exit(f"{path} is of {name} {own[name]}, {RUN} of {machine[name]}: not the results of one run")
    more = {name: value for name, value in own.items() if machine.get(name) != value}
    return content | ({"machine": more} if more else {})


def keep(folder: Path, results: Path, name: str | None) -> Path:
    """Writes the results of one run's folder into one file; says what is missing and what is left out."""
    if not (folder / RUN).is_file():
        sys.exit(f"{folder} has no {RUN}: it is not the folder of a run")
    run = read_json(folder / RUN)
    machine = run.get("machine", {}) if isinstance(run, dict) else {}
    if not isinstance(machine, dict):
        sys.exit(f"{folder / RUN}: its machine is no record, but {machine!r}")
    if name is not None and name != slug(name):
        sys.exit(f"--name {name}: give small letters, digits and '-', as in {slug(name) or 'h200-first'}")
    if unnamed := [name for name in (*SAME, "date") if name not in machine]:
        sys.exit(f"{folder / RUN} does not say which {', '.join(unnamed)}")
    sections, others = {}, []
    for path in sorted(folder.iterdir()):
        if path.name == RUN:
            continue
        section = section_of(path, machine) if path.suffix == ".json" else None
        if section is None:
            others.append(path.name)
        else:
            sections[path.stem] = section
    if not sections:
        sys.exit(f"{folder} has no results but {RUN}")
    path = results / f"{name or machine['date'][:10] + '-' + slug(machine['device'])}.json"
    if path.exists():
        sys.exit(f"{path} is there already, and is not overwritten: give --name")
    sections = {name: sections[name] for name in (*SECTIONS, *sections) if name in sections}
    for section, content in sections.items():  # what cannot be shown would stop the page of all devices
        try:
            [markdown(table, 4) for table in section_tables(section, content, machine)]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            sys.exit(f"{folder / section}.json is damaged, or of another version: {type(error).__name__} {error}")
    results.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine, "run": run.get("sections", []), "sections": sections})
    print(f"kept {', '.join(sections)} in {path}")
    if missing := [name for name in SECTIONS if name not in sections]:
        print(f"missing: {', '.join(missing)}")
    if others:
        print(f"left out, no results: {', '.join(others)}")
    return path


# ---- the page ----


def ended(status: Any) -> str:
    """How a section of a run ended, by its exit status or in its own word."""
    if status in (0, "0", "ok", "done", "passed"):
        return "done"
    if status in (124, "124"):
        return "**out of time**"
    return f"**failed**, exit status {status}" if str(status).lstrip("-").isdigit() else f"**{status}**"


def run_table(result: Result) -> Table:
    rows = [[s["name"], ended(s.get("status")), s.get("seconds"), s.get("says")] for s in result["run"]]
    missing = [name for name in SECTIONS if name not in result["sections"]]
    note = f"Without a result: {', '.join(missing)}." if missing else []
    return {"title": "The run", "columns": ["section", "ended", "seconds", "says"], "rows": rows, "note": note}


def facts(machine: dict[str, Any], file: str) -> str:
    """When, at which commit, with which versions, and where the figures are."""
    plain = {
        name: value for name, value in machine.items() if not isinstance(value, dict)
    }  # not all tools and packages
    named = {name: value for name, value in plain.items() if name not in ("device", "date", "commit")}
    versions = ", ".join(f"{name} {cell(value)}" for name, value in named.items() if value != "missing")
    without = [name for name, value in named.items() if value == "missing"]
    end = f"; without {', '.join(without)}" if without else ""
    return wrapped(f"{machine['date'][:10]}, commit {machine['commit']}; {versions}{end} (`benchmarks/results/{file}`)")


def older_line(name: str, result: Result) -> str:
    machine, parts = result["machine"], []
    for section, content in result["sections"].items():
        said = loss_gpu_report.headline(content) if section == "loss" else ""
        parts.append(f"{section} ({said})" if said else section)
    return wrapped(f"{machine['date'][:10]}, commit {machine['commit']}, `{name}`: {', '.join(parts)}", "- ")


def device_part(device: str, results: list[tuple[str, Result]]) -> str:
    """A device's newest result; of older ones the sections that the newest does not have, and a line each."""
    parts, shown = [f"### {device}"], set()
    for number, (name, result) in enumerate(results):
        machine = result["machine"]
        new = {section: content for section, content in result["sections"].items() if section not in shown}
        shown |= set(new)
        if number == 0 or new:
            parts.append(facts(machine, name))
        if number == 0 and result.get("run"):
            parts.append(markdown(run_table(result), 4))
        for section, content in new.items():
            parts += [markdown(table, 4) for table in section_tables(section, content, machine)]
    if len(results) > 1:
        older = "\n".join(older_line(*pair) for pair in results[1:])
        parts.append(f"Older results of this device:\n\n{older}")
    return "\n\n".join(parts)


def against_model(model: Result, measured: list[tuple[str, Result]]) -> Table | None:
    """What was measured of a model's predictions, by the newest result of its device that has the loss."""
    prediction = model["sections"].get("model", {})
    predicted = prediction.get("predicted_ms")
    losses = [
        r for _, r in measured if r["machine"]["device"] == model["machine"]["device"] and "loss" in r["sections"]
    ]
    if not predicted or not losses:
        return None
    rows = []
    for row in losses[0]["sections"]["loss"]["rows"]:
        ms = row["sides"].get("ours", {}).get("ms")
        if (row["N"], row["V"]) == (prediction["N"], prediction["V"]) and row["objective"] in predicted and ms:
            expected = predicted[row["objective"]]
            rows.append([row["objective"], expected, ms, f"{ms / expected:.2f}x"])
    columns = ["objective", "predicted ms", "measured ms", "measured over predicted"]
    note = f"Measured {losses[0]['machine']['date'][:10]} at commit {losses[0]['machine']['commit']}."
    return {"title": "The model and what was measured since", "columns": columns, "rows": rows, "note": note}


def page(results: dict[str, Result]) -> str:
    """The text of docs/benchmarks.md. `results`: by the name of the file."""
    newest = sorted(results.items(), key=lambda pair: (pair[1]["machine"]["date"], pair[0]), reverse=True)
    measured = [pair for pair in newest if not pair[1].get("modelled")]
    modelled = [pair for pair in newest if pair[1].get("modelled")]
    parts = [TOP]
    devices: dict[str, list[tuple[str, Result]]] = {}
    for pair in measured:
        devices.setdefault(pair[1]["machine"]["device"], []).append(pair)
    if all(device.startswith("CPU") for device in devices):
        parts.append(f"**{NO_GPU}**")
    parts.append("## Measured")
    parts += [device_part(*group) for group in devices.items()] or ["Nothing yet."]
    parts.append(MODELLED)
    for name, result in modelled:
        machine = result["machine"]
        parts += [f"### {machine['device']}, a model", facts(machine, name)]
        for section, content in result["sections"].items():
            parts += [markdown(table, 4) for table in section_tables(section, content, machine)]
        compared = against_model(result, measured)
        parts.append(markdown(compared, 4) if compared else "No measurement has been set beside this model yet.")
    return "\n\n".join(parts if modelled else [*parts, "Nothing yet."]) + "\n"


def read_results(folder: Path) -> dict[str, Result]:
    results = {path.name: read_json(path) for path in sorted(folder.glob("*.json"))}
    for name, result in results.items():
        machine = result.get("machine", {}) if isinstance(result, dict) else {}
        if not {"device", "commit", "date"} <= set(machine) or not isinstance(result.get("sections"), dict):
            sys.exit(
                f"{folder / name} is no kept result: it needs sections, and a machine with device, commit and date"
            )
    return results


def docs(results: Path, path: Path, check: bool) -> None:
    text = page(read_results(results))
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}")
        return
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if there != text:
        lines = list(difflib.unified_diff(there.splitlines(), text.splitlines(), str(path), "the results", lineterm=""))
        print("\n".join(lines[:40]))
        sys.exit(f"{path} is not what {results} gives: python benchmarks/results.py docs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep", help="the JSON files of a run into one")
    keeping.add_argument("folder", type=Path, help="the OUT of a run")
    keeping.add_argument("--name", help="of the file, without .json; its date and device")
    making = commands.add_parser("docs", help="make the page")
    making.add_argument("--check", action="store_true", help="only compare it")
    making.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    for command in (keeping, making):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    if options.command == "keep":
        keep(options.folder, options.results, options.name)
    else:
        docs(options.results, options.page, options.check)


if __name__ == "__main__":
    main()
