"""A run as a comparison reads it: its options, its scores by sample, its budget, its curves.

Knows the files of a run directory, and loads neither torch nor a model. Does not know what runs are compared for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pocl_fast.answers.sample_scores import score_file
from pocl_fast.options.run import RunConfig
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import near_paths, read_json_lines
from pocl_fast.system.typed_values import did_you_mean

BY_ANSWER = ("rouge_l", "exact_match")  # a value for each sampled answer; in percent once they are read
BY_TOKEN = ("cross_entropy", "mean_kl")  # a mean over a sample's tokens, in nats
_EVALUATION = "evaluate-"  # what the names of the steps that evaluate begin with
_TRAINING = {"warmup": "warmup/metrics.jsonl", "train": "metrics.jsonl", "sft": "metrics.jsonl"}  # steps that train
_ALIKE = ("eval_seeds", "max_new_tokens", "rouge_tokenizer")  # what scores that are compared must have in common


@dataclass(frozen=True)
class SetScores:
    """The scores of a trained student on one data set."""

    name: str
    role: str  # "dev" or "test"
    chooses_weights: bool
    source: str
    fingerprint: str  # of the prompts and references that are scored, in their order
    prompts: list[str]
    tokens: np.ndarray  # [samples] float64: those that are trained on
    values: dict[str, np.ndarray]  # [samples] float64 of each metric that every sample has: means over its answers
    before: dict[str, float]  # means of the student as it was given; empty where it was not evaluated
    teacher: dict[str, float]  # of the teacher

    @property
    def samples(self) -> int:
        return len(self.prompts)

    def mean(self, metric: str) -> float:
        """The mean over the samples, of a metric by token over all tokens."""
        return float(np.average(self.values[metric], weights=self.weights(metric)))

    def weights(self, metric: str) -> np.ndarray | None:
        """What each sample weighs in the mean; None where all weigh alike."""
        return self.tokens if metric in BY_TOKEN else None


@dataclass(frozen=True)
class Curve:
    """A score at the optimizer steps at which it was measured."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison reads of a run."""

    path: Path
    kind: str  # "distill" or "sft"
    config: Mapping[str, Any]  # every option, as config.yaml has it
    made_from: Mapping[str, Any]  # what its steps but the evaluation were made from; empty where that is not recorded
    evaluated: Mapping[str, Any]  # options that make scores comparable
    teacher: str | None  # that mean KL is to: what it was identified by; None where no teacher was compared with
    sets: Mapping[str, SetScores]  # by fingerprint
    steps: int | None  # of the optimizer, those of a warm-up too; None where metrics.jsonl is missing
    seconds: float | None  # that training took, with a warm-up
    records: Sequence[Mapping[str, Any]]  # of metrics.jsonl

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    def curve(self, metric: str) -> Curve:
        """The held-out score `eval_METRIC` over the optimizer steps; empty where none was logged."""
        name = f"eval_{metric}"
        found = {r["step"]: r[name] for r in self.records if isinstance(r.get(name), (int, float)) and "step" in r}
        steps = sorted(found)
        return Curve(np.array(steps, dtype=np.float64), np.array([found[step] for step in steps], dtype=np.float64))


def read_run(path: Path) -> ComparedRun:
    """What a run directory holds for a comparison.

    Raises `InputError` where there is no run, where its trained student was not evaluated, and for a file that is
    damaged or of another evaluation than the others.
    """
    config = _config(path)
    results = _evaluation(path)
    stamps = _mapping(path / "steps.json")
    made_from: dict[str, Any] = {}
    for step, stamp in stamps.items():
        if not step.startswith(_EVALUATION):
            made_from |= stamp.get("made_from", {})
    sets: dict[str, SetScores] = {}
    for name, one in results.items():
        read = _set_scores(path, name, one)
        twice = read.fingerprint in sets  # the same samples under two names
        sets[f"{read.fingerprint} {name}" if twice else read.fingerprint] = read
    after = stamps.get(_EVALUATION + "after", {}).get("made_from", {})
    evaluated = {name: after.get(name, config.get(name)) for name in _ALIKE}
    evaluated["eval_seeds"] = next(iter(results.values()))["scores"]["after"]["seeds"]
    logs = {name: _log(path / name) for name in sorted(set(_TRAINING.values()))}
    steps = [_steps(stamps, name, log) for name, log in logs.items()]
    seconds = [stamps[step]["seconds"] for step in _TRAINING if "seconds" in stamps.get(step, {})]
    return ComparedRun(
        path=path,
        kind="sft" if "sft" in stamps else "distill",
        config=config,
        made_from=made_from,
        evaluated=evaluated,
        teacher=after.get("teacher", made_from.get("teacher", config.get("teacher"))),
        sets=sets,
        steps=sum(steps) if logs["metrics.jsonl"] else None,
        seconds=sum(seconds) if seconds else None,
        records=logs["metrics.jsonl"],
    )


def _steps(stamps: Mapping[str, Any], name: str, log: Sequence[Mapping[str, Any]]) -> int:
    """The optimizer steps of a training: as its stamp has them, for it may have logged none, or the last logged one."""
    for step, of in _TRAINING.items():
        if of == name and "steps" in stamps.get(step, {}):
            return int(stamps[step]["steps"])
    return max((r["step"] for r in log if isinstance(r.get("step"), int)), default=0)


def _log(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.is_file() else []


def _config(path: Path) -> dict[str, Any]:
    """Every option with its value: those that an earlier version did not record have their defaults."""
    if not path.exists():
        near = did_you_mean(str(path), near_paths(str(path)))
        raise InputError(f"there is no folder {path}{near}; give run directories of pocl-fast")
    known = path / "config.yaml"
    if not known.is_file():
        raise InputError(f"{path} holds no run: it has no config.yaml; give run directories of pocl-fast")
    try:
        options = yaml.safe_load(known.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {known}: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"{known}: expected options as `name: value` lines, got {type(options).__name__}")
    return RunConfig().flat() | options


def _evaluation(path: Path) -> dict[str, Any]:
    """What evaluation.json holds of each set, by its name; each was scored after training."""
    again = f"`pocl-fast evaluate --output {path}`"
    known = path / "evaluation.json"
    if not known.is_file():
        raise InputError(f"{path} is not evaluated yet: it has no evaluation.json; run {again} first")
    sets = _mapping(known).get("sets")
    if not isinstance(sets, dict):
        raise InputError(f"{known} is of an earlier version, without scores by sample; run {again} --restart")
    scored = {name: one for name, one in sets.items() if "after" in one.get("scores", {})}
    if not scored:
        raise InputError(f"{path} is not evaluated yet: {known} has no scores after training; run {again} first")
    for name, one in scored.items():
        if "fingerprint" not in one or "seeds" not in one["scores"]["after"]:
            raise InputError(f"{known}: the set {name} has no fingerprint or no seeds; run {again} --restart")
    return scored


def _set_scores(path: Path, name: str, one: dict[str, Any]) -> SetScores:
    table_path = score_file(path, name, "after")
    try:
        table = pq.read_table(table_path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"cannot read {table_path}, the scores of each sample; run `pocl-fast evaluate --output {path} --restart`:"
            f" {error}"
        ) from error
    needed = ("prompt", "tokens", *BY_ANSWER, *BY_TOKEN)
    if missing := [column for column in needed if column not in table.column_names]:
        raise InputError(f"{table_path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    if not len(table):
        raise InputError(f"{table_path} holds no sample")
    values = {metric: _by_sample(table[metric]) for metric in (*BY_ANSWER, *BY_TOKEN)}
    values["exact_match"] = 100 * values["exact_match"]
    scores = one["scores"]
    read = SetScores(
        name=name,
        role=one.get("role", "dev"),
        chooses_weights=bool(one.get("chooses_weights")),
        source=str(one.get("source", "")),
        fingerprint=str(one["fingerprint"]),
        prompts=table["prompt"].to_pylist(),
        tokens=table["tokens"].to_numpy().astype(np.float64),
        values={metric: column for metric, column in values.items() if np.isfinite(column).all()},
        before=_means(scores.get("before")),
        teacher=_means(scores.get("teacher")),
    )
    for metric, mean in _means(scores["after"]).items():
        if metric in read.values and abs(read.mean(metric) - mean) > 1e-3 * max(1.0, abs(mean)):
            raise InputError(
                f"{table_path} and {path / 'evaluation.json'} are of two evaluations: {metric} on {name} is"
                f" {read.mean(metric):.4f} and {mean:.4f}; run `pocl-fast evaluate --output {path} --restart`"
            )
    return read


def _means(scores: dict[str, Any] | None) -> dict[str, float]:
    """The means of all metrics that were computed; nothing of scores that are missing."""
    known = {metric: (scores or {}).get(metric) for metric in (*BY_ANSWER, *BY_TOKEN)}
    return {metric: float(mean) for metric, mean in known.items() if mean is not None}


def _by_sample(column: pa.ChunkedArray) -> np.ndarray:
    """[samples] float64: the mean over a sample's answers where the column has lists; NaN for null."""
    rows = column.to_pylist()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        rows = [np.mean(row) if row and None not in row else np.nan for row in rows]
    return np.array([np.nan if row is None else row for row in rows], dtype=np.float64)


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: expected an object, got {type(value).__name__}")
    return value
