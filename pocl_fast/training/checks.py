"""What is refused before anything is loaded or computed, for it would fail only in the midst of a training.

Knows options. Does not know models or data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

from pocl_fast.curriculum.signals import teacher_columns
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig

NOT_LISTED = {"flyte": "flytekit", "azure_ml": "azureml"}  # packages that transformers does not count as installed


class CheckedOptions(Protocol):
    """What `check_options` looks at: a `PoclConfig` has it, and so has a run's configuration."""

    @property
    def report_to(self) -> str | Sequence[str] | None: ...
    @property
    def remeasure(self) -> bool: ...
    @property
    def signals(self) -> str: ...
    @property
    def cache_mode(self) -> str: ...


def check_options(options: CheckedOptions) -> None:
    """Raises `InputError` for options that a training could not follow, whatever its models and data are."""
    check_report_to(options.report_to)
    columns = teacher_columns(options.signals)
    if columns and options.remeasure and options.cache_mode == "topk":
        raise InputError(top_k_lacks(columns))


def check_evaluations(args: PoclConfig) -> None:
    """Raises `InputError` where options need evaluations and there are none."""
    if args.eval_strategy != "no":
        return
    if args.rollouts == "adaptive":
        raise InputError('rollouts="adaptive" follows the dev loss: give eval_dataset and eval_strategy')
    if args.stage_weights == "best":
        raise InputError('stage_weights="best" needs evaluations: give eval_dataset and eval_strategy')


def check_report_to(report_to: str | Sequence[str] | None) -> None:
    """Raises `InputError` for a place to report to that transformers does not know, or whose package is missing."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    known = sorted(INTEGRATION_TO_CALLBACK)
    installed = set(get_available_reporting_integrations()) if names else set()
    installed |= {name for name, package in NOT_LISTED.items() if importlib.util.find_spec(package) is not None}
    for name in names:
        if name in ("none", "all") or (name in known and name in installed):
            continue
        if name not in known:
            raise InputError(f"report_to {name!r} is not known: give none, all, or one of {', '.join(known)}")
        usable = ", ".join(sorted(installed)) or "none is"
        raise InputError(
            f"report_to {name!r} needs a package that is not installed (installed: {usable}): install it, or give none"
        )


def top_k_lacks(columns: Sequence[str]) -> str:
    """What is wrong with a top-k cache where these columns are to be measured from it."""
    return (
        f"a trainer measures {', '.join(columns)} from the teacher's cache, and cache_mode=topk keeps only the most"
        " likely tokens: give cache_mode=hidden, or signals that do not read the teacher"
    )
