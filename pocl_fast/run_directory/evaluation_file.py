"""evaluation.json: each set's role, content and scores, before and after training and of the teacher.

Knows the file's form. Does not know how scores are made, nor how they are shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocl_fast.data.sample_set import SampleSet
from pocl_fast.system.files import write_json

EVALUATION = "evaluation.json"


def record(run: Path, when: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds what was found of each set, and takes away sets that have no other scores. A set has `role`,
    `chooses_weights`, `source`, `samples`, `fingerprint` and `scores`."""
    path = run / EVALUATION
    known = without(json.loads(path.read_text(encoding="utf-8")), when)["sets"] if path.exists() else {}
    sets = {}
    for name, one in found.items():
        before = known.pop(name, None)
        same = before is not None and before["fingerprint"] == one["fingerprint"]  # else of other samples
        sets[name] = {**one, "scores": (before["scores"] if before and same else {}) | {when: one["scores"]}}
    write_json(path, {"sets": sets | known})


def without(results: dict[str, Any], when: str) -> dict[str, Any]:
    """The same without the scores of one time, and without sets that have no others."""
    sets = {
        name: {**one, "scores": {other: scores for other, scores in one["scores"].items() if other != when}}
        for name, one in results["sets"].items()
    }
    return {"sets": {name: one for name, one in sets.items() if one["scores"]}}


def content_of(data: SampleSet) -> str:
    """SHA-256 of the prompts and references that are scored, in order: equal for the same samples in any file, asked in
    any template."""
    digest = hashlib.sha256()
    for one in data.encoded:
        sample = data.samples[one.index]
        asked = [sample.messages, sample.references]
        digest.update(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
