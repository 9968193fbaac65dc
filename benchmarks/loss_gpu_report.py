"""The tables and the picture of a result of loss_gpu.py. Knows its JSON and nothing of GPUs or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_form import Table, console

SIDES = ("ours", "liger", "eager", "compiled")
NO_TIME = ("wrong", "failed", "dropped", "absent")  # why a side has none


def why_none(outcome: dict[str, Any]) -> str | None:
    """The word of NO_TIME that says why a side has no time."""
    return next((word for word in NO_TIME if word in outcome), None)


def time_cell(outcome: dict[str, Any], ours_ms: float | None) -> str | None:
    """A side's ms, over ours, and in how many pieces it was run; or why it has none."""
    if "ms" not in outcome:
        return why_none(outcome)
    ratio = f" ({outcome['ms'] / ours_ms:.1f}x)" if ours_ms else ""
    pieces = f" in {outcome['pieces']}" if outcome.get("pieces", 1) > 1 else ""
    return f"{outcome['ms']:.2f}{ratio}{pieces}"


def cells(row: dict[str, Any], sides: list[str]) -> list[Any]:
    outcomes = [row["sides"].get(side, {}) for side in sides]
    ours = row["sides"].get("ours", {})
    share = f"{100 * row['floor_ms'] / ours['ms']:.0f} %" if "ms" in ours else None
    pairs = zip(sides, outcomes, strict=True)
    times = [time_cell(outcome, None if side == "ours" else ours.get("ms")) for side, outcome in pairs]
    memory = [_gibibytes(outcome.get("peak_extra_bytes")) for outcome in outcomes]
    errors = ["–" if (error := outcome.get("gradient_error")) is None else f"{error:.0e}" for outcome in outcomes]
    return [f"{row['objective']} {row['N']} x {row['V']}", share, *times, " / ".join(memory), " / ".join(errors)]


def _gibibytes(number: int | None) -> str:
    return "–" if number is None else f"{number / 2**30:.2f}"


def reasons(call: dict[str, Any]) -> list[str]:
    """Everything that was left out, failed or is wrong, and where."""
    places: dict[str, list[str]] = {}
    for row in call["rows"]:
        place = f"{row['objective']} {row['N']} x {row['V']}"
        for side, outcome in row["sides"].items():
            for word in NO_TIME:
                if word in outcome:
                    places.setdefault(f"{side}, {word}: {outcome[word]}", []).append(place)
            if outcome.get("pieces", 1) > 1:
                places.setdefault(f"{side} did not fit the memory whole, run in pieces of the rows", []).append(place)
    if call["dropped"]:
        places["whole rows dropped, no time left"] = call["dropped"]
    said = []
    for reason, where in places.items():
        if len(where) > 6 and "dropped" not in reason:  # what was dropped is named in full
            where = [*where[:5], f"{len(where) - 5} more"]
        said.append(f"{reason} ({', '.join(where)})")
    return said


def call_table(call: dict[str, Any], title: str, claim: str) -> Table:
    """What one call of loss_gpu.py measured."""
    sides = [side for side in SIDES if any(side in row["sides"] for row in call["rows"])]
    columns = ["objective, tokens x entries", "share of the floor", *(f"{side}, ms" for side in sides)]
    columns += [f"memory GiB: {' / '.join(sides)}", f"error: {' / '.join(sides)}"]
    rows = [cells(row, sides) for row in call["rows"]]
    if not any("peak_extra_bytes" in outcome for row in call["rows"] for outcome in row["sides"].values()):
        columns, rows = [*columns[:-2], columns[-1]], [[*row[:-2], row[-1]] for row in rows]  # a CPU's is not measured
    return {"title": title, "claim": claim, "columns": columns, "rows": rows, "note": reasons(call)}


def tables(result: dict[str, Any]) -> list[Table]:
    """The first call's, and each later one's: its ratios are over ours of that later call."""
    bandwidth = result["machine"].get("copy_GB_a_second")
    at = f" at {bandwidth:.3g} GB/s" if bandwidth else ""
    claim = (
        "Forward and backward of the loss on given bf16 logits, all sides on the same tensors in turns, on a GPU with"
        " the L2 cache flushed before each run. Medians; in brackets over ours. The floor is the time to read both"
        f" logits and to write the gradient, 6 bytes a logit, at the speed of a large copy{at}. Memory is the peak"
        " beyond inputs and gradient; error is the gradient's against float64, in norm."
    )
    found = [call_table(result, "The fused loss", claim)] if result["rows"] or result["dropped"] else []
    for later in result.get("later_calls", []):
        title = f"The fused loss: measured in another call ({later['machine']['date']})"
        found.append(call_table(later, title, "Its ratios are over ours as measured in this other call."))
    return found


def print_table(result: dict[str, Any]) -> None:
    for table in tables(result):
        print(f"\n{console(table)}", flush=True)


def headline(result: dict[str, Any]) -> str:
    """The first row's time of ours, for a list of results; empty where it has none."""
    for row in result["rows"]:
        ours = row["sides"].get("ours", {})
        if "ms" in ours:
            share = 100 * row["floor_ms"] / ours["ms"]
            return f"{row['objective']} {row['N']} x {row['V']}: {ours['ms']:.2f} ms, {share:.0f} % of the floor"
    return ""


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time over the floor for each size, on a logarithmic scale. A side that the first call does not have is
    taken from a later one, over that one's floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    calls = [result, *result.get("later_calls", [])]
    over_floor: dict[tuple, float] = {}
    for row in (row for call in calls for row in call["rows"]):
        for side, outcome in row["sides"].items():
            if "ms" in outcome:
                place = (row["objective"], row["N"], row["V"], side)
                over_floor.setdefault(place, outcome["ms"] / row["floor_ms"])
    sizes = list(dict.fromkeys(place[1:3] for place in over_floor))
    figure, axes = plt.subplots(len(sizes), 1, figsize=(11, 3.2 * len(sizes)), squeeze=False)
    for axis, size in zip(axes[:, 0], sizes, strict=True):
        names = list(dict.fromkeys(place[0] for place in over_floor if place[1:3] == size))
        for k, side in enumerate(SIDES):
            ratios = [over_floor.get((name, *size, side), 0.0) for name in names]
            axis.bar([n + 0.2 * (k - 1.5) for n in range(len(names))], ratios, 0.2, label=side)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log", title=f"{size[0]} tokens x {size[1]} entries, bf16", ylabel="time over the 6-byte floor")
        axis.set_xticks(range(len(names)), [name.replace("+", "\n+ ") for name in names])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(SIDES), loc="lower center")
    facts = result["machine"]
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, copy at {facts['copy_GB_a_second']:.0f} GB/s")
    figure.tight_layout(rect=(0, 0.1 / len(sizes), 1, 1))  # room for the legend
    figure.savefig(path, dpi=120)
