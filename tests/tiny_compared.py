"""Run directories with scores that are made up, as far as a comparison reads them: no model runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.options.run import RunConfig
from pocl_fast.run_directory.step_inputs import READS
from pocl_fast.settings.configuration import from_options, to_yaml

SEEDS = (10, 20)


def make_scores(
    samples: int = 40,
    *,
    better: float = 0.0,
    seed: int = 0,
    seeds: Sequence[int] = SEEDS,
    lines: Any = None,
    **other: Any,
) -> dict[str, Any]:
    """The columns of a table of scores: of `samples` prompts that are as hard in every run, answered so much `better`
    in ROUGE-L and CE by a student of this training seed."""
    hard = np.random.default_rng(1)
    rouge, tokens = hard.uniform(10, 60, samples), hard.integers(3, 30, samples)
    loss = hard.uniform(1, 4, samples)
    mine = np.random.default_rng([100 + seed, round(100 * abs(better))])
    answers = rouge[:, None] + better + mine.normal(0, 3, (samples, len(seeds)))
    columns = {
        "line": list(range(1, samples + 1)) if lines is None else list(lines),
        "prompt": [f"question {n}" for n in range(samples)],
        "references": [[f"answer {n}"] for n in range(samples)],
        "answers": [[f"answer {n} {s}" for s in seeds] for n in range(samples)],
        "rouge_l": np.clip(answers, 0, 100).tolist(),
        "exact_match": (answers > 50).tolist(),
        "cross_entropy": (loss - better / 20 + mine.normal(0, 0.1, samples)).tolist(),
        "tokens": tokens.tolist(),
        "mean_kl": (loss / 3 - better / 40 + mine.normal(0, 0.05, samples)).tolist(),
    }
    return columns | other


def make_run(
    folder: Path,
    *,
    sets: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 1,
    better: float = 0.0,
    steps: int | None = 20,
    seconds: float = 60.0,
    seeds: Sequence[int] = SEEDS,
    max_new_tokens: int = 128,
    fingerprints: Mapping[str, str] | None = None,
    chooses: Sequence[str] = ("dev",),
    data: str = "1" * 64,
    **options: Any,
) -> Path:
    """A run directory, evaluated on `sets` (name -> columns of its table; "dev" without it)."""
    (folder / "scores").mkdir(parents=True)
    config = from_options(
        {"seed": seed, "eval_seeds": list(seeds), "max_new_tokens": max_new_tokens, "teacher": "models/teacher",
         "train": "data/train.jsonl", "student_layers": 2} | options
    )  # fmt: skip
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "steps.json").write_text(json.dumps(_stamps(config, data, seconds)), encoding="utf-8")
    if sets is None:
        sets = {"dev": make_scores(better=better, seed=seed, seeds=seeds)}
    results = {}
    for name, columns in sets.items():
        pq.write_table(pa.table(dict(columns)), folder / "scores" / f"{name}-after.parquet")
        results[name] = {
            "role": "test" if name.startswith("test") else "dev",
            "chooses_weights": name in chooses,
            "source": f"data/{name}.jsonl",
            "samples": len(columns["line"]),
            "fingerprint": (fingerprints or {}).get(name, name * 4),
            "scores": {
                "before": means(make_scores(len(columns["line"]), better=-5), seeds),
                "after": means(columns, seeds),
                "teacher": means(make_scores(len(columns["line"]), better=15), seeds),
            },
        }
    (folder / "evaluation.json").write_text(json.dumps({"sets": results}), encoding="utf-8")
    if steps is not None:
        (folder / "metrics.jsonl").write_text("".join(_metrics(steps, better, seed)), encoding="utf-8")
    return folder


def means(columns: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """What evaluation.json says of a table of scores."""
    tokens = np.array(columns["tokens"], dtype=float)
    by_token = {
        name: float(np.average(columns[name], weights=tokens)) if None not in columns[name] else None
        for name in ("cross_entropy", "mean_kl")
    }
    rouge, exact = np.array(columns["rouge_l"]), 100 * np.array(columns["exact_match"], dtype=float)
    return by_token | {
        "seeds": list(seeds),
        "rouge_l": float(rouge.mean()),
        "rouge_l_spread": float(rouge.mean(axis=0).std()),
        "exact_match": float(exact.mean()),
        "samples": len(tokens),
    }


def _stamps(config: RunConfig, data: str, seconds: float) -> dict[str, Any]:
    """What each step was made from, by the names that the run directory records."""
    stamps = {}
    for step in ("measure", "rank", "train", "evaluate-after"):
        reads = READS[step]
        made_from = {name: value for name, value in reads.options(config).items() if name not in ("train", "dev")}
        if step in ("measure", "train"):
            made_from["train data"] = data
        if made_from.get("teacher") is not None:
            made_from["teacher"] = f"{config.models.teacher} (0123456789abcdef)"
        if step == "train":  # the order of one seed is not that of another
            made_from["curriculum.json"] = f"{config.optimisation.seed:064}"
        stamps[step] = {"done": True, "made_from": made_from, "seconds": seconds, "peak_bytes": 1 << 30}
    return stamps


def _metrics(steps: int, better: float, seed: int) -> list[str]:
    lines = []
    for step in range(5, steps + 1, 5):
        score = 20 + better + seed / 5 + 10 * (step / steps) ** 0.6 + float(np.sin(step + 3 * seed))
        lines.append({"step": step, "loss": 2.0, "ce": 3.0, "divergence": 1.0, "stage": 0})
        lines.append({"step": step, "eval_rouge_l": score, "eval_cross_entropy": 4 - score / 20, "stage": 0})
    return [json.dumps(line) + "\n" for line in lines]
