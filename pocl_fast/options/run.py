"""All options of a run, by group."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pocl_fast.options.answers import DifficultyOptions, EvaluationOptions, GenerationOptions, TeacherEvaluation
from pocl_fast.options.data import AdapterOptions, DataFiles, DataOptions, ModelNames, ModelOptions
from pocl_fast.options.declaring import document, option_name
from pocl_fast.options.training import (
    CacheOptions,
    LoggingOptions,
    LossOptions,
    OptimisationOptions,
    RolloutOptions,
    ScheduleOptions,
    StageOptions,
    WarmupOptions,
)


@dataclass
class RunModels(ModelOptions, ModelNames):
    """Teacher and student."""


@dataclass
class RunData(DataOptions, DataFiles):
    """Training and held-out samples, and their lengths in tokens."""


@dataclass
class RunEvaluation(EvaluationOptions, TeacherEvaluation):
    """The final evaluation: sampling at temperature 1, top-p 1."""


@dataclass
class TrainerArguments:
    """Any other argument of transformers' TrainingArguments."""

    set: dict[str, Any] = field(default_factory=dict)
    """NAME=VALUE ...: arguments that have no option of their own, such as optim=adamw_8bit warmup_ratio=0.03
    eval_strategy=no; values are numbers, true, false, null, text, or JSON for a dict. In YAML a dict."""


@dataclass(frozen=True)
class RunConfig:
    """All options of a run, by group."""

    models: RunModels = field(default_factory=RunModels)
    data: RunData = field(default_factory=RunData)
    adapters: AdapterOptions = field(default_factory=AdapterOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    difficulty: DifficultyOptions = field(default_factory=DifficultyOptions)
    warmup: WarmupOptions = field(default_factory=WarmupOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    stages: StageOptions = field(default_factory=StageOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    trainer: TrainerArguments = field(default_factory=TrainerArguments)
    rollouts: RolloutOptions = field(default_factory=RolloutOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    evaluation: RunEvaluation = field(default_factory=RunEvaluation)

    def flat(self) -> dict[str, Any]:
        """Option name -> value, as in a YAML file: groups dissolved, paths as text."""
        groups = (getattr(self, group.name) for group in fields(self))
        values = {option_name(f): getattr(group, f.name) for group in groups for f in fields(group)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def trainer_options(self) -> dict[str, Any]:
        """Field name -> value of what a run and `PoclConfig` both have."""
        alone = (ModelNames, DataFiles, WarmupOptions, TeacherEvaluation, TrainerArguments)
        only_runs = {f.name for group in alone for f in fields(group)}
        groups = (getattr(self, group.name) for group in fields(self))
        return {f.name: getattr(group, f.name) for group in groups for f in fields(group) if f.name not in only_runs}


document(__name__)
