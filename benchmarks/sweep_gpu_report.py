"""What sweep_gpu.py found, as tables: every tile, the fastest of each size, and the scaling of a gradient."""

from __future__ import annotations

from typing import Any

from table_form import Table

from pocl_fast.kernels.tiles import Tile

CASES = ("1 for all", "1 a token", "-1 for all")  # factors of the scaling
NO_TIME = ("wrong", "failed", "uncompiled", "absent")  # why a row has no time
Row = dict[str, Any]


def words(tile: Tile) -> str:
    return f"{tile.num_warps} warps, {tile.vec} logits, stages {tile.stages}"


def best_rows(result: dict[str, Any]) -> list[tuple[Row, Row | None]]:
    """Of each objective and size the fastest tile's row, and today's, if that has a time."""
    groups: dict[tuple, list[Row]] = {}
    for row in result["rows"]:
        if "ms" in row:
            groups.setdefault((row["objective"], row["N"], row["V"]), []).append(row)
    return [
        (min(rows, key=lambda row: row["ms"]), next((row for row in rows if row["today"]), None))
        for rows in groups.values()
    ]


def time_cell(row: Row, key: str) -> Any:
    return row.get(key, next((word for word in NO_TIME if word in row), None))


def place(row: Row) -> str:
    return f"{row.get('objective') or row['how']} {row['N']} x {row['V']}"


def share(row: Row, key: str) -> str | None:
    return f"{100 * row['floor_ms'] / row[key]:.0f} %" if key in row else None


def tile_cells(row: Row) -> list[Any]:
    kibibytes = row["shared_bytes"] / 1024 if "shared_bytes" in row else None
    cells = [place(row) + (", today's" if row["today"] else ""), row["num_warps"], row["vec"], row["stages"]]
    cells += [time_cell(row, "ms"), share(row, "ms"), row.get("registers"), row.get("spilled_words")]
    return [*cells, kibibytes, row.get("compile_seconds")]


def best_cells(row: Row, today: Row | None) -> list[Any]:
    cells = [place(row), row["num_warps"], row["vec"], row["stages"], row["ms"]]
    return cells + ([today["ms"], today.get("ms_again"), f"{today['ms'] / row['ms']:.2f}x"] if today else [None] * 3)


def reasons(rows: list[Row]) -> list[str]:
    places: dict[str, list[str]] = {}
    for row in rows:
        for word in NO_TIME:
            if word in row:
                tile = f", {words(Tile(*(row[field] for field in Tile._fields)))}" if "lanes" in row else ""
                places.setdefault(f"{word}: {row[word]}", []).append(place(row) + tile)
    return [f"{reason} ({'; '.join(of)})" for reason, of in places.items()]


def tables(result: dict[str, Any]) -> list[Table]:
    at = f"{result['machine']['copy_GB_a_second']:.3g} GB/s"
    shape = ["objective, tokens x entries", "warps", "logits a thread", "stages", "ms"]
    tried = {
        "title": "Tiles of the dense kernel",
        "claim": "Loss and gradient from bf16 logits, the row kernel and the sum of its losses alone; medians, with the"
        f" L2 flushed. The floor is 6 bytes a logit at the bandwidth of a large copy, {at}.",
        "columns": [*shape, "share of the floor", "registers", "spilled words", "shared KiB", "s to compile"],
        "rows": [tile_cells(row) for row in result["rows"]],
        "note": reasons(result["rows"]),
    }
    best = {
        "title": "The fastest tiles",
        "columns": [*shape, "today's ms", "at the end", "gain"],
        "rows": [best_cells(*pair) for pair in best_rows(result)],
    }
    scaling = {
        "title": "Multiplying a gradient by what comes in",
        "claim": f"In place, bf16; a factor of 1 should cost nothing. The floor is 4 bytes an entry at {at}.",
        "columns": ["way, tokens x entries", *(f"ms, {case}" for case in CASES), "share of the floor at -1"],
        "rows": [
            [place(row), *(time_cell(row, case) for case in CASES), share(row, CASES[-1])] for row in result["scaling"]
        ],
        "note": reasons(result["scaling"]),
    }
    return [tried, scaling, best]
