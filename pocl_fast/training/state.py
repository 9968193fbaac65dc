"""`TrainingState`: how far a training is, beyond what a transformers trainer records; a file in each checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json

STATE = "pocl_state.json"  # in each checkpoint


def goodness(score: float, cross_entropy: float) -> tuple[float, float]:
    """What evaluations are compared by: a score of which more is better, then the lower cross-entropy. NaN is the worst
    of either."""
    return -math.inf if math.isnan(score) else score, -math.inf if math.isnan(cross_entropy) else -cross_entropy


@dataclass
class Best:
    """A stage's best evaluation."""

    score: float
    step: int  # optimizer steps done
    cross_entropy: float  # which decides between equal scores


@dataclass
class TrainingState:
    """The running stage and what is known of each stage, by the stage's number from 0."""

    stage: int = -1  # the running one
    best: dict[int, Best] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)  # steps after which a stage was ended early
    evaluations_since_best: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    seconds: dict[int, float] = field(default_factory=dict)  # of training and evaluation
    losses: dict[int, float] = field(default_factory=dict)  # the last logged
    rollouts: dict[str, Any] = field(default_factory=dict)  # `Rollouts.state_dict`
    plan: dict[str, Any] = field(default_factory=dict)  # `Schedule.identity`: what a step's number means

    def begin(self, stage: int) -> None:
        """Notes that a stage begins."""
        self.stage, self.evaluations_since_best = stage, 0

    def evaluated(self, score: float, step: int, cross_entropy: float, *, greater_is_better: bool) -> bool:
        """Notes an evaluation of the running stage after so many optimizer steps; says whether it is its best: of equal
        scores the one with the lower cross-entropy, and of equal ones in both the later. NaN is the worst of either.
        Only a better score or cross-entropy counts against `evaluations_since_best`."""
        best, sign = self.best.get(self.stage), 1 if greater_is_better else -1
        now = Best(score, step, cross_entropy)
        found = goodness(sign * score, cross_entropy)
        before = None if best is None else goodness(sign * best.score, best.cross_entropy)
        self.evaluations_since_best = 0 if before is None or found > before else self.evaluations_since_best + 1
        if before is not None and found < before:
            return False
        self.best[self.stage] = now
        return True

    def add_seconds(self, seconds: float) -> None:
        """Adds to the time of the running stage."""
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + seconds

    def check_plan(self, plan: dict[str, Any], checkpoint: Path) -> None:
        """Raises `InputError` where a step's number means something else than it did at the checkpoint."""
        for name, value in plan.items():
            if (before := self.plan.get(name)) != value:
                raise InputError(
                    f"checkpoint {checkpoint} is of another schedule ({name}: {before} there, {value} here): give the"
                    " settings it was made with, or another output_dir"
                )

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> TrainingState:
        """What `write` wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        for name in ("best", "ended", "seconds", "losses"):
            record[name] = {int(stage): value for stage, value in record[name].items()}
        record["best"] = {stage: Best(**best) for stage, best in record["best"].items()}
        return cls(**record)
