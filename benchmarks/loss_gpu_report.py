"""The table and the picture of a result of loss_gpu.py. Knows its JSON and nothing of GPUs or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDES = ("ours", "liger", "eager", "compiled")
NO_TIME = ("wrong", "failed", "dropped", "absent")  # why a side has none


def print_row(row: dict[str, Any]) -> None:
    sides, cells = row["sides"], []
    ours = sides.get("ours", {}).get("ms")
    share = f"{100 * row['floor_ms'] / ours:.0f} %" if ours else "-"
    for side in SIDES:
        result = sides.get(side, {})
        ratio = f" ({result['ms'] / ours:.1f}x)" if ours and "ms" in result and side != "ours" else ""
        why = next((word for word in NO_TIME if word in result), "-")
        mark = f" in {result['pieces']}" if result.get("pieces", 1) > 1 else ""
        cells.append(f"{result['ms']:.2f}{ratio}{mark}" if "ms" in result else why)
    memory = [sides.get(side, {}).get("peak_extra_bytes") for side in SIDES]
    errors = [sides.get(side, {}).get("gradient_error") for side in SIDES]
    cells.append(" ".join("-" if peak is None else f"{peak / 2**30:.2f}" for peak in memory))
    cells.append(" ".join("-" if error is None else f"{error:.0e}" for error in errors))
    line = f"{row['objective']:<19}{row['N']:>5} x {row['V']:<7}{cells[0]:>9}{share:>7}"
    print(line + "{:>19}{:>19}{:>19}  {:<22}{}".format(*cells[1:]), flush=True)


def print_table(result: dict[str, Any]) -> None:
    print("\nms (over ours); floor: share of 6 bytes a logit at the copy's bandwidth; memory: GiB beyond inputs and")
    print(f"gradient, error: of the gradient against float64, in norm; both of {', '.join(SIDES)}")
    columns = ("ours", "floor", *SIDES[1:], "memory", "error")
    print("{:<34}{:>9}{:>7}{:>19}{:>19}{:>19}  {:<22}{}".format("objective, N x V", *columns))
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        print_row(row)
        place = f"{row['objective']} {row['N']} x {row['V']}"
        for side, outcome in row["sides"].items():
            for word in NO_TIME:
                if word in outcome:
                    reasons.setdefault(f"{side}, {word}: {outcome[word]}", []).append(place)
            if outcome.get("pieces", 1) > 1:
                reasons.setdefault(f"{side} did not fit the memory whole, run in pieces of the rows", []).append(place)
    if result["dropped"]:
        reasons["whole rows dropped, no time left"] = result["dropped"]
    for reason, places in reasons.items():
        if len(places) > 6 and "dropped" not in reason:  # what was dropped is named in full
            places = [*places[:5], f"{len(places) - 5} more"]
        print(f"- {reason} ({', '.join(places)})")


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time over the floor for each size, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys((row["N"], row["V"]) for row in result["rows"]))
    figure, axes = plt.subplots(len(sizes), 1, figsize=(11, 3.2 * len(sizes)), squeeze=False)
    for axis, size in zip(axes[:, 0], sizes, strict=True):
        rows = [row for row in result["rows"] if (row["N"], row["V"]) == size]
        for k, side in enumerate(SIDES):
            ratios = [row["sides"].get(side, {}).get("ms", 0) / row["floor_ms"] for row in rows]
            axis.bar([n + 0.2 * (k - 1.5) for n in range(len(rows))], ratios, 0.2, label=side)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log", title=f"{size[0]} tokens x {size[1]} entries, bf16", ylabel="time over the 6-byte floor")
        axis.set_xticks(range(len(rows)), [row["objective"].replace("+", "\n+ ") for row in rows])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(SIDES), loc="lower center")
    facts = result["machine"]
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, copy at {facts['copy_GB_a_second']:.0f} GB/s")
    figure.tight_layout(rect=(0, 0.1 / len(sizes), 1, 1))  # room for the legend
    figure.savefig(path, dpi=120)
