"""Difficulty signals: each computes a score from a sample's record, and says which end of the scores is easy.

Knows the columns of the difficulty tables and the option `--signals`. Does not know how columns are measured, nor how
rankings are fused. docs/adding-a-signal.md says how to add one.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from pocl_fast.answers.likelihood import TEACHER_COLUMNS
from pocl_fast.system.errors import InputError

Record: TypeAlias = Mapping[str, Any]  # column -> a sample's value, or all samples' values as an array
TEACHER_SCORES = "teacher_scores.parquet"  # the file of `TEACHER_COLUMNS`, which lies beside the difficulty table


@dataclass(frozen=True)
class Signal:
    """A score of each sample, by which samples can be ranked."""

    name: str
    score: Callable[[Record], Any]
    easy: Literal["high", "low"]  # which scores are easy samples'
    columns: tuple[str, ...] | None  # what the function reads; None: all
    meaning: str  # in words, with the unit
    one_by_one: bool = False  # a user's function, which takes one sample at a time

    def scores(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """[samples] float64 scores out of columns [samples]. Raises `InputError` where a user's function fails."""
        if not self.one_by_one:
            return np.asarray(self.score(columns), dtype=np.float64)
        names = list(columns) if self.columns is None else ["index", *self.columns]
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        return np.array([self._score_of(dict(zip(names, row, strict=True))) for row in rows], dtype=np.float64)

    def _score_of(self, record: Record) -> float:
        where = f"--signals {self.name}: sample {record['index']}"
        try:
            score = self.score(record)
        except Exception as error:  # whatever a user's function raises is about that function
            raise InputError(f"{where}: {type(error).__name__}: {error}") from error
        try:
            return float(score)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: the function must give a number, got {score!r}") from error


def _column(name: str, easy: Literal["high", "low"], meaning: str) -> Signal:
    return Signal(name, lambda record: record[name], easy, (name,), meaning)


BUILT_IN = {
    signal.name: signal
    for signal in (
        _column("rouge_l", "high", "ROUGE-L of the student's answer"),
        _column("cross_entropy", "low", "cross-entropy of the reference, nats a token"),
        _column("answer_length", "low", "length of what is trained on, tokens"),
        _column("teacher_cross_entropy", "low", "the teacher's cross-entropy of the reference, nats a token"),
        Signal(
            "cross_entropy_gap",
            lambda record: record["cross_entropy"] - record["teacher_cross_entropy"],
            "low",
            ("cross_entropy", "teacher_cross_entropy"),
            "cross-entropy of the reference, student's less teacher's, nats a token",
        ),
        _column("mean_kl", "low", "KL(teacher || student) over the reference, nats a token"),
    )
}


@dataclass(frozen=True)
class Weighted:
    """A signal and what its ranks weigh in the fusion."""

    signal: Signal
    weight: float = 1.0


def chosen_signals(given: str) -> list[Weighted]:
    """The signals of `--signals`: names separated by commas, each with `=WEIGHT` behind it or not.

    A name is one of `BUILT_IN` or `package.module:function`: a function from a sample's record (a dict of the
    difficulty tables' columns) to a number. The function may have two attributes: `easy`, the end of its scores that
    is easy ("low" without it, or "high"), and `columns`, the columns it reads (a tuple; without it, all columns).

    Raises `InputError` for an unknown or repeated name, a function that cannot be imported and a weight that is not
    a positive number.
    """
    chosen: list[Weighted] = []
    for part in given.split(","):
        name, _, weight = part.strip().partition("=")
        name = name.strip()
        if any(one.signal.name == name for one in chosen):
            raise InputError(f"--signals names {name} twice: give it a weight instead, as in {name}=2")
        chosen.append(Weighted(_named(name), _weight(part, weight) if "=" in part else 1.0))
    return chosen


def columns_read(chosen: list[Weighted]) -> tuple[str, ...] | None:
    """The columns of a difficulty table that the signals read; None for all of them."""
    if any(one.signal.columns is None for one in chosen):
        return None
    return tuple(dict.fromkeys(name for one in chosen for name in one.signal.columns or ()))


def teacher_columns(given: str) -> tuple[str, ...]:
    """Those of `TEACHER_COLUMNS` that the signals of `--signals` read."""
    read = {name for one in chosen_signals(given) for name in one.signal.columns or ()}
    return tuple(name for name in TEACHER_COLUMNS if name in read)


def may_read_teacher(given: str) -> bool:
    """Whether the signals of `--signals` read `TEACHER_COLUMNS` where these are there."""
    read = columns_read(chosen_signals(given))
    return read is None or not set(TEACHER_COLUMNS).isdisjoint(read)


def _weight(part: str, given: str) -> float:
    try:
        weight = float(given)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"--signals {part.strip()}: a weight must be a positive number, got {given.strip()!r}")
    return weight


def _named(name: str) -> Signal:
    if ":" in name:
        return _of_user(name)
    if name not in BUILT_IN:
        raise InputError(
            f"--signals: no signal named {name!r}; there are {', '.join(BUILT_IN)}, and functions of your own,"
            " named package.module:function"
        )
    return BUILT_IN[name]


def _of_user(name: str) -> Signal:
    function = _imported(name)
    easy: Any = getattr(function, "easy", "low")
    columns: Any = getattr(function, "columns", None)
    if easy not in ("high", "low"):
        raise InputError(f'--signals {name}: the function\'s attribute `easy` must be "high" or "low", got {easy!r}')
    if columns is not None and (isinstance(columns, str) or not all(isinstance(column, str) for column in columns)):
        raise InputError(f"--signals {name}: the function's attribute `columns` must list names, got {columns!r}")
    return Signal(name, function, easy, None if columns is None else tuple(columns), name, one_by_one=True)


def _imported(name: str) -> Callable[[Record], Any]:
    module_name, _, attribute = name.partition(":")
    try:
        with _working_folder_importable():
            function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InputError(f"--signals {name}: cannot import {module_name} ({error})") from error
    except AttributeError as error:
        raise InputError(f"--signals {name}: {module_name} has no function {attribute!r}") from error
    except Exception as error:  # the module's own code failed
        raise InputError(
            f"--signals {name}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise InputError(f"--signals {name}: must be a function, is a {type(function).__name__}")
    return function


@contextlib.contextmanager
def _working_folder_importable() -> Iterator[None]:
    """A command installed by pip does not look for modules where it is called, `python -m` does."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.pop(0)


def top_k_lacks(columns: Sequence[str]) -> str:
    """What is wrong with a top-k cache where these columns are to be measured from it."""
    return (
        f"a trainer measures {', '.join(columns)} from the teacher's cache, and cache_mode=topk keeps only the most"
        " likely tokens: give cache_mode=hidden, or signals that do not read the teacher"
    )
