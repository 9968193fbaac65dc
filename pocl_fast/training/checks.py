"""Options that cannot be followed together, found before anything is loaded or computed.

Knows options. Does not know models or data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pocl_fast.curriculum.signals import teacher_columns
from pocl_fast.system.errors import InputError


class MeasureAgainOptions(Protocol):
    """Whether and by what the difficulty is measured again, and how the teacher is kept."""

    @property
    def remeasure(self) -> bool: ...
    @property
    def signals(self) -> str: ...
    @property
    def cache_mode(self) -> str: ...


class EvaluatedOptions(Protocol):
    """What follows evaluations, and whether there are any."""

    @property
    def rollouts(self) -> str: ...
    @property
    def stage_weights(self) -> str: ...
    @property
    def eval_strategy(self) -> str: ...


def check_measured_again(options: MeasureAgainOptions) -> None:
    """Raises `InputError` where difficulty is to be measured again from a cache that lacks what the signals need."""
    if options.remeasure and options.cache_mode == "topk" and (columns := teacher_columns(options.signals)):
        raise InputError(top_k_lacks(columns))


def check_evaluations(options: EvaluatedOptions) -> None:
    """Raises `InputError` where options need evaluations and there are none."""
    if options.eval_strategy != "no":
        return
    if options.rollouts == "adaptive":
        raise InputError('rollouts="adaptive" follows the dev loss: give eval_dataset and eval_strategy')
    if options.stage_weights == "best":
        raise InputError('stage_weights="best" needs evaluations: give eval_dataset and eval_strategy')


def top_k_lacks(columns: Sequence[str]) -> str:
    """What is wrong with a top-k cache where these columns are to be measured from it."""
    return (
        f"a trainer measures {', '.join(columns)} from the teacher's cache, and cache_mode=topk keeps only the most"
        " likely tokens: give cache_mode=hidden, or signals that do not read the teacher"
    )
