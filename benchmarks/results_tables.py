"""The tables of each section of a kept result. Knows the JSON of the benchmarks, and nothing of files or pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import loss_gpu_report
from table_form import Table, is_table

Result = dict[str, Any]


def smoke_tables(section: Result) -> list[Table]:
    """A row a job of smoke_gpu.py; failed and absent checks by name."""
    rows, notes = [], []
    for job in section["jobs"]:
        counts = [
            sum(check["status"] == status for check in job["checks"]) for status in ("passed", "failed", "absent")
        ]
        rows.append([job["job"], *counts, job.get("seconds")])
        for check in job["checks"]:
            if check["status"] != "passed":
                bold = "**failed**" if check["status"] == "failed" else check["status"]
                notes.append(f"{bold}: {job['job']}, {check['check']}: {check.get('reason', 'no reason')}")
    passed, failed, absent = (sum(row[k] for row in rows) for k in (1, 2, 3))
    return [
        {
            "title": "Smoke checks",
            "claim": "All that the product runs on the device, compared with float64 on random numbers:"
            f" {passed} checks passed, {failed} failed, {absent} absent.",
            "columns": ["job", "passed", "failed", "absent", "seconds"],
            "rows": rows,
            "note": notes,
        }
    ]


TRAINING = ("side", "ms a step", "over ours", "tokens a second", "MFU", "peak GiB", "launches", "idle", "loss off")


def training_row(side: str, outcome: Result, why: str | None, first: float | None) -> list[Any]:
    """The cells of TRAINING; `first`: seconds a step of ours. A side that has no figures has a word, `why`."""
    step, peak, profile = outcome.get("seconds_a_step"), outcome.get("peak_bytes"), outcome.get("profile", {})
    return [
        side,
        why or (1e3 * step if step else None),
        f"{step / first:.2f}x" if step and first else None,
        outcome.get("tokens_a_second"),
        f"{100 * outcome['mfu']:.1f} %" if "mfu" in outcome else None,
        peak / 2**30 if peak else None,
        profile.get("launches"),
        f"{100 * profile['idle_share']:.0f} %" if "idle_share" in profile else None,
        outcome.get("loss_gap"),
    ]


def training_tables(section: Result) -> list[Table]:
    """A table a size of batch of train_gpu.py."""
    tables = []
    for batch in section["rows"]:
        steps = {side: outcome.get("seconds_a_step") for side, outcome in batch["sides"].items()}
        first = next((seconds for side, seconds in steps.items() if side.startswith("ours") and seconds), None)
        rows, notes = [], [f"**{batch['failure']}**"] if batch.get("failure") else []
        for side, outcome in batch["sides"].items():
            why = next((word for word in ("failed", "absent", "dropped") if word in outcome), None)
            if why:
                notes.append(f"{side}, {why}: {outcome[why]}")
            if outcome.get("pieces", 1) > 1:
                notes.append(f"{side}: a batch does not fit the memory whole, in {outcome['pieces']} pieces")
            rows.append(training_row(side, outcome, why, first))
        title = f"Training steps: {section.get('shapes', '')}, batches of {batch['batch']}"
        claim = (
            f"{batch['tokens_a_step']:,.0f} tokens a step, {batch['supervised_a_step']:,.0f} supervised;"
            f" {100 * batch['padding']:.0f} % of the padded rectangles is padding. The ratio is over the first row of"
            " ours. MFU: floating-point operations that the step needs, over its time and the speed of a large"
            " product. Idle: share of a profiled step in which the GPU does nothing. Loss off: the largest relative"
            " difference from the losses of ours."
        )
        tables.append({"title": title, "claim": claim, "columns": list(TRAINING), "rows": rows, "note": notes})
    return tables


def plain_tables(name: str, section: Result) -> list[Table]:
    """A result of no known form: lists of records, and records by name, as tables; single values as notes."""
    tables: list[Table] = []
    notes = []
    for key, value in section.items():
        records = value
        if isinstance(value, dict) and value and all(isinstance(record, dict) for record in value.values()):
            records = [{"name": name} | record for name, record in value.items()]
        if isinstance(records, list) and records and all(isinstance(record, dict) for record in records):
            columns = list(dict.fromkeys(column for record in records for column in record))
            rows = [[_short(record.get(column)) for column in columns] for record in records]
            tables.append({"title": f"{name}: {key}", "columns": columns, "rows": rows})
        elif value not in ({}, [], None):
            notes.append(f"{key}: {_short(value)}")
    tables = tables or [{"title": name, "columns": [], "rows": []}]
    tables[-1]["note"] = notes
    return tables


def _short(value: Any) -> Any:
    if not isinstance(value, dict | list):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]} …"


TABLES: dict[str, Callable[[Result], list[Table]]] = {
    "smoke": smoke_tables,
    "loss": loss_gpu_report.tables,
    "training": training_tables,
}


def section_tables(name: str, section: Result, machine: dict[str, Any]) -> list[Table]:
    section = section | {"machine": machine | section.get("machine", {})}
    if is_table(section):
        return [section]
    if "tables" not in section:
        shown = {key: value for key, value in section.items() if key != "machine"}
        return TABLES[name](section) if name in TABLES else plain_tables(name, shown)
    tables = [dict(table) for table in section["tables"]]
    if section.get("dropped"):
        tables.append({"columns": [], "rows": [], "note": f"Dropped: {'; '.join(section['dropped'])}."})
    return tables
