"""metrics.jsonl: what training measured, a line a log or evaluation, in the order of the steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Writes metrics.jsonl; each record has its stage and step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, stage: int, step: int) -> None:
        """Drops what comes after this step, which is about to be done again."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if (line["stage"], line["step"]) <= (stage, step)]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
