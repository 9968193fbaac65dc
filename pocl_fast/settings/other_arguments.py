"""Arguments of transformers' `TrainingArguments` that have no option of their own: what `--set` takes.

Knows names and types, and which option decides an argument. Does not know what the arguments do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from transformers import TrainingArguments

from pocl_fast.options.declaring import flag
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import Range, did_you_mean, hints_of, typed
from pocl_fast.training.arguments import NOT_HERE, RENAMED, TRAINER_GROUPS, WHOLE_SCHEDULE

# argument -> what decides it in a run
DECIDED_BY = {option.name: flag(option) for group in TRAINER_GROUPS for option in fields(group)} | {
    "gradient_checkpointing": "--activation-checkpointing",
    "bf16": "--precision",
    "use_cpu": "--device",
    "output_dir": "--output",
    "resume_from_checkpoint": "--restart; a run resumes by itself",
    "hub_token": "the environment (HF_TOKEN) or `hf auth login`: the run would record it",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command"),
}


def other_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with values of their declared types.

    Raises `InputError` for a name that transformers does not know, for one that an option or the trainer decides, and
    for a value of the wrong type.
    """
    hints = hints_of(TrainingArguments)
    known = [argument.name for argument in fields(TrainingArguments)]
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if decider := DECIDED_BY.get(name):
            problems.append(f"{name} is decided by {decider}")
        elif name == "num_train_epochs":
            problems.append(WHOLE_SCHEDULE)
        elif name in NOT_HERE:
            problems.append(f"{name} is not for this trainer: {NOT_HERE[name]}")
        elif name in RENAMED and name not in known:
            problems += _add_ratio(values, given, name)
        elif name not in known:
            near = did_you_mean(name, [one for one in known if one not in NOT_HERE])
            problems.append(f"transformers' TrainingArguments have no {name!r}{near}")
        else:
            try:
                values[name] = typed(value, hints[name])
            except ValueError as error:
                problems.append(f"{name} {error}")
    if problems:
        raise InputError("; ".join(problems))
    return values


def _add_ratio(values: dict[str, Any], given: Mapping[str, Any], name: str) -> list[str]:
    """Adds an argument that transformers now has under another name, as a share; what is wrong with it."""
    if RENAMED[name] in given:
        return [f"{name} and {RENAMED[name]} are the same argument: give one of them"]
    try:
        ratio = typed(given[name], Annotated[float, Range(at_least=0, below=1)])
    except ValueError as error:
        return [f"{name} {error}"]
    values[RENAMED[name]] = ratio
    return []
