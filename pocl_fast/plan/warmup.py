"""The warm-up of a run: its passes, optimizer steps and tokens.

Knows the options of a warm-up. Does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocl_fast.curriculum.stages import stages_over
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.plan.context import PlanContext
from pocl_fast.run.warmup_step import warmup_arguments
from pocl_fast.training.setup import schedule_of


@dataclass(frozen=True)
class WarmupPlan:
    """The supervised steps before the student is measured."""

    samples: int
    passes: float
    steps: int
    tokens: int  # trained on in all, each pass counted; prompts included
    learning_rate: float  # its peak
    checkpoints: int  # that are there at a time, until it is done


def warmup_plan(context: PlanContext, encoded: Sequence[EncodedSample]) -> WarmupPlan | None:
    """The numbers of the warm-up over these samples; None where the options ask for none."""
    arguments = warmup_arguments(context)
    if arguments is None:
        return None
    index = np.array([one.index for one in encoded])
    schedule = schedule_of(arguments, stages_over(index, np.zeros(len(index)), arguments), encoded)
    steps = schedule.total_steps
    passes = schedule.place(steps - 1).passes
    kept = (
        0 if str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) == "no" else int(-(-passes // 1))
    )
    if arguments.save_total_limit is not None:
        kept = min(kept, arguments.save_total_limit + 1)  # an old one goes once the new one is whole
    return WarmupPlan(
        samples=len(encoded),
        passes=round(passes, 4),
        steps=steps,
        tokens=round(passes * sum(map(len, encoded))),
        learning_rate=arguments.learning_rate,
        checkpoints=kept,
    )
