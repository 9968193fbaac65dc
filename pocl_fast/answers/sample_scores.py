"""A model's scores on each sample of a set, their summary with 95 % intervals, and the table that keeps them.

ROUGE-L is in percent everywhere, cross-entropy and divergence are in nats a token. Knows columns of numbers. Does not
know models, nor how an answer is scored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pocl_fast.answers.intervals import bootstrap_interval
from pocl_fast.system.errors import InputError

Interval: TypeAlias = tuple[float, float]

_MOST_NATS = 700.0  # whose exponential is a float64


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one set. ROUGE-L and exact match in percent, of the answer to each sample's last question;
    cross-entropy and divergence in nats a token that is trained on, each of these tokens weighing alike.

    Intervals are of 95 %, over samples drawn anew; None for one sample alone.
    """

    seeds: tuple[int, ...]
    rouge_l: float  # mean over the seeds of the mean over the samples
    rouge_l_spread: float  # standard deviation over the seeds; 0 of one seed
    rouge_l_interval: Interval | None
    exact_match: float
    exact_match_interval: Interval | None
    cross_entropy: float  # of the references
    cross_entropy_interval: Interval | None
    perplexity: float
    mean_kl: float | None  # KL(teacher || student); None where no teacher is compared with
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of one model on each sample of a set, of an answer a seed."""

    seeds: tuple[int, ...]
    answers: Sequence[Sequence[str]]  # of each sample, one a seed
    rouge_l: np.ndarray  # [samples, seeds], percent
    exact_match: np.ndarray  # [samples, seeds], bool
    cross_entropy: np.ndarray  # [samples], nats a token
    tokens: np.ndarray  # [samples], that are trained on
    mean_kl: np.ndarray | None = None  # [samples], nats a token

    def summary(self) -> Scores:
        """Means over samples and seeds. An interval is that of the mean over samples of each one's mean over seeds."""
        rouge, exact = self.rouge_l.mean(axis=1), 100.0 * self.exact_match.mean(axis=1)
        loss = self._a_token(self.cross_entropy)
        return Scores(
            seeds=self.seeds,
            rouge_l=float(rouge.mean()),
            rouge_l_spread=float(self.rouge_l.mean(axis=0).std()),
            rouge_l_interval=_interval(rouge),
            exact_match=float(exact.mean()),
            exact_match_interval=_interval(exact),
            cross_entropy=loss,
            cross_entropy_interval=_interval(self.cross_entropy, self.tokens),
            perplexity=math.exp(min(loss, _MOST_NATS)),
            mean_kl=None if self.mean_kl is None else self._a_token(self.mean_kl),
            samples=len(rouge),
        )

    def _a_token(self, means: np.ndarray) -> float:
        return float((means * self.tokens).sum() / self.tokens.sum())


def _interval(values: np.ndarray, weights: np.ndarray | None = None) -> Interval | None:
    """That of the values' mean over samples; None for one sample, and for values that are not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    _, low, high = bootstrap_interval(values, weights=weights)
    return None if low is None or high is None else (low, high)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What one sample of a set asks, and what its answers are compared with."""

    line: int  # in its file, from 1
    prompt: str  # its last question
    references: Sequence[str]


def score_file(run: Path, name: str, when: str) -> Path:
    """Where a run keeps the scores on each sample of a set: of the student at a moment, or of the teacher."""
    return run / "scores" / f"{name}-{when}.parquet"


def write_scores(path: Path, asked: Sequence[Asked], scores: SampleScores) -> None:
    """Writes a row a sample (Parquet) under a temporary name, then renames."""
    import pyarrow as pa  # which a trainer does without
    import pyarrow.parquet as pq

    kl = scores.mean_kl
    columns = {
        "line": [one.line for one in asked],
        "prompt": [one.prompt for one in asked],
        "references": [list(one.references) for one in asked],
        "answers": [list(of_one) for of_one in scores.answers],
        "rouge_l": scores.rouge_l.tolist(),
        "exact_match": scores.exact_match.tolist(),
        "cross_entropy": scores.cross_entropy.tolist(),
        "tokens": scores.tokens.tolist(),
        "mean_kl": [None] * len(asked) if kl is None else kl.tolist(),
    }
    seeds = {"seeds": json.dumps(list(scores.seeds))}
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=_schema().with_metadata(seeds)), partial)
    os.replace(partial, path)


def read_scores(path: Path) -> SampleScores:
    """The scores that `write_scores` wrote. Raises `InputError` for another file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        seeds = tuple(json.loads(table.schema.metadata[b"seeds"]))
        kl = table["mean_kl"]
        return SampleScores(
            seeds,
            table["answers"].to_pylist(),
            np.array(table["rouge_l"].to_pylist(), dtype=float),
            np.array(table["exact_match"].to_pylist(), dtype=bool),
            table["cross_entropy"].to_numpy(),
            table["tokens"].to_numpy(),
            None if kl.null_count else kl.to_numpy(),
        )
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no table of scores ({error}): delete it to have it made again") from error


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("line", pa.int64()),
            ("prompt", pa.string()),
            ("references", pa.list_(pa.string())),
            ("answers", pa.list_(pa.string())),
            ("rouge_l", pa.list_(pa.float64())),
            ("exact_match", pa.list_(pa.bool_())),
            ("cross_entropy", pa.float64()),
            ("tokens", pa.int64()),
            ("mean_kl", pa.float64()),
        ]
    )
