"""What a run refuses before its first step, in one list: for the run itself, and for a plan of it.

Knows which checks there are, and their order. Does not know how each is done (context.py, train_step.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import numpy as np

from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import stages_over
from pocl_fast.run.context import RunContext
from pocl_fast.run.train_step import trainer_arguments
from pocl_fast.run.warmup_step import warmup_arguments

if TYPE_CHECKING:
    from pocl_fast.training.arguments import PoclConfig

Part = Literal["teacher", "student", "dev"]


def check(context: RunContext, *, missing: Collection[Part] = ()) -> PoclConfig:
    """Reads data, tokenizers and schedule, and raises `InputError` for what is wrong with them. The trainer's
    arguments.

    What needs a part that is `missing` is left out; without it the options must name every part.
    """
    chosen_signals(context.config.difficulty.signals)
    arguments = trainer_arguments(context)
    warmup_arguments(context)
    context.check_teacher_device()
    context.check_engine()
    count = len(context.train_file.encoded)
    if "dev" not in missing:
        _ = context.dev_set
    stages_over(np.arange(count), np.zeros(count), context.config.schedule)
    if {"teacher", "student"}.isdisjoint(missing):
        context.check_vocabularies()
        context.check_sizes()
    else:
        context.check_named_model()
    return arguments
