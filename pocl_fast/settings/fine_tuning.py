"""The options of a run of `pocl-fast sft`: those of every run, of which it fixes some and has its own for others.

Knows options. Does not know how a model is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocl_fast.options.declaring import Count
from pocl_fast.options.run import RunConfig
from pocl_fast.settings.configuration import from_options
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import typed

# 3, as most recipes for instructions have (Alpaca's, TRL's default); the best pass on the held-out samples is kept
EPOCHS = 3
# cross-entropy alone, over all samples in one stage
FIXED: dict[str, Any] = {
    "teacher": None, "teacher_quantization": "none", "teacher_device": "student", "data_source": "data",
    "curriculum": "none", "pacing": "baby-steps", "stages": 1, "temperature": [1.0], "alpha": [1.0],
    "rollouts": "none", "remeasure": False,
    "warmup_epochs": None, "warmup_steps": None, "warmup_learning_rate": None,
}  # fmt: skip
_TEACHER = ("teacher", "teacher_quantization", "teacher_device")


def begun(recorded: RunConfig) -> RunConfig:
    """What the options of a run go over: those that it recorded, or its defaults."""
    if recorded != RunConfig():
        return recorded
    return from_options({"epochs_per_stage": EPOCHS})


def completed(config: RunConfig, model: str | None, epochs: int | None, recorded: RunConfig | None = None) -> RunConfig:
    """The options with what the command fixes, and its own ones in their places. A teacher that a run of this command
    has `recorded`, for its evaluations compare with it, stays.

    Raises `InputError` where no model is named, and for options of distilling that a YAML file or the folder's run has.
    """
    values, defaults = config.flat(), RunConfig().flat()
    given = FIXED | _scored_teacher((recorded or RunConfig()).flat())
    if wrong := [name for name, fixed in given.items() if values[name] not in (fixed, defaults[name])]:
        what = ", ".join(f"{name} {values[name]!r}" for name in wrong)
        raise InputError(
            f"`pocl-fast sft` fine-tunes without a teacher, and has no {what}: leave that out of the YAML file, or give"
            " another --output than that of a run of `pocl-fast distill`"
        )
    if model is not None:
        given["student"] = model
    elif values["student"] is None:
        raise InputError("--model is missing: give what is to be fine-tuned")
    if epochs is not None:
        try:
            given["epochs_per_stage"] = typed(epochs, Count)
        except ValueError as error:
            raise InputError(f"--epochs {error}") from error
    return from_options(given, config)


def _scored_teacher(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the teacher that a fine-tuning is evaluated with; nothing of a run of another kind."""
    if any(recorded[name] != fixed for name, fixed in FIXED.items() if name not in _TEACHER):
        return {}
    return {name: recorded[name] for name in _TEACHER}
