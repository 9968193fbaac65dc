"""What each step of a run is made from, which files it leaves, and which other steps these concern: declarations.

Knows options and names of files. Does not know what the steps do, nor how stamps are kept (directory.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from pocl_fast.curriculum.signals import TEACHER_SCORES
from pocl_fast.curriculum.stages import is_measured
from pocl_fast.options.declaring import option_name
from pocl_fast.options.run import RunConfig
from pocl_fast.options.training import OptimisationOptions
from pocl_fast.settings.evaluation_sets import SETS, sets_of


@dataclass(frozen=True)
class Reads:
    """What a step is made from: every option of these groups but those named, and files by their content."""

    groups: tuple[str, ...]
    but: tuple[str, ...]  # options that do not change the step's result
    files: tuple[str, ...] = ()
    to_remeasure: tuple[str, ...] = ()  # options that only --remeasure reads here
    set_aside: tuple[str, ...] = ()  # beginnings of the names of --set arguments that it does not read
    student: bool = False  # whether it is made from the student that is measured, which a warm-up has made

    def options(self, config: RunConfig) -> dict[str, Any]:
        """The values of these options, by name; an argument of --set under its own."""
        values: dict[str, Any] = {}
        for group in (getattr(config, name) for name in self.groups):
            values |= {option_name(f): getattr(group, f.name) for f in fields(group)}
        others = values.pop("set", {})
        if not config.stages.remeasure:
            values = {name: value for name, value in values.items() if name not in self.to_remeasure}
        if others.get("eval_strategy") == "steps" and "eval_steps" not in others and "logging" in self.groups:
            others = others | {"eval_steps": config.logging.logging_steps}  # what transformers takes then
        if config.adapters.lora_rank is None and config.adapters.peft_config is None:
            values = {name: value for name, value in values.items() if name not in _OF_ADAPTERS}
        if config.schedule.pacing != "competence":
            values = {name: value for name, value in values.items() if name not in _OF_COMPETENCE}
        if config.data.dev:
            values.pop("held_out", None)
        if "warmup" in self.groups and config.warmup.warmup_learning_rate is not None:
            values.pop("learning_rate")
        unread = (*_AROUND, *self.set_aside)
        values |= {f"--set {name}": value for name, value in others.items() if not name.startswith(unread)}
        return {name: value for name, value in values.items() if name not in self.but}


LAYERS = "layers"  # no step of its own: the choice of layers that measuring makes for a student, for all steps
WARMED = "warmup/student"  # the warmed-up student
STUDENT, STUDENT_ADAPTERS = "student/model.safetensors", "student/adapter_model.safetensors"
WARM = "warmed-up student"
_OF_ADAPTERS = ("lora_alpha", "lora_targets", "merge_adapters")  # which mean nothing without adapters
_OF_COMPETENCE = ("initial_competence", "full_competence")
_DEVICES = ("device", "teacher_device")
_TEACHER = ("teacher", "teacher_quantization")
# beginnings of the names of transformers' arguments that do not change what is learnt
_AROUND = (
    "log", "save_", "run_name", "project", "trackio_", "hub_", "push_to_hub", "dataloader_", "disable_tqdm", "ddp_",
    "torch_empty_cache_steps", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
    "skip_memory_metrics", "debug",
)  # fmt: skip
# and those that a warm-up does without: its learning rate is one cosine, nothing is evaluated or uploaded
NOT_IN_WARMUP = (
    "lr_scheduler", "warmup_", "max_steps", "eval_", "metric_for_best_model", "greater_is_better", "hub_",
    "push_to_hub", "run_name",
)  # fmt: skip
_TRAINING = ("loss", "stages", "optimisation", "logging", "trainer", "rollouts", "cache")
_SPEED = ("generation_batch_size", "generation_batch_tokens", "activation_checkpointing")
_LOGS = ("logging_steps", "report_to", "save_minutes")
READS = {
    "warmup": Reads(
        ("models", "data", "adapters", "warmup", "optimisation", "trainer"),
        (*_DEVICES, *_TEACHER, *SETS, "merge_adapters", "activation_checkpointing"),
        set_aside=NOT_IN_WARMUP,
    ),
    "measure": Reads(
        ("models", "data", "generation", "difficulty"), (*_DEVICES, *_TEACHER, *SETS, "signals"), student=True
    ),
    "measure-teacher": Reads(("models", "data"), (*_DEVICES, *SETS), student=True),
    "rank": Reads(
        ("difficulty", "schedule"), ("measure_temperature", "measure_seed"), ("difficulty.parquet", TEACHER_SCORES)
    ),
    "rank-unmeasured": Reads(  # rank, where the order is that of the samples themselves
        ("models", "data", "generation", "schedule", "optimisation"),
        (
            *_DEVICES, *_TEACHER, "precision", "student_layers", "layer_choice", *SETS, "generation_batch_size",
            "generation_batch_tokens", "generation_engine", "rouge_tokenizer", "rrf_k", "ties",
            *(option_name(f) for f in fields(OptimisationOptions) if f.name != "seed"),
        ),
    ),
    "train": Reads(
        ("models", "data", "adapters", "generation", "difficulty", "schedule", *_TRAINING),
        (*_DEVICES, "test", *_SPEED, *_LOGS),
        ("curriculum.json",),
        (
            "generation_engine", "signals", "measure_temperature", "measure_seed", "rrf_k", "ties", "temperature",
            "alpha",
        ),
        student=True,
    ),
    "sft": Reads(
        ("models", "data", "adapters", "generation", "stages", "optimisation", "logging", "trainer"),
        (*_DEVICES, *_TEACHER, *_SPEED, *_LOGS, "test", "data_source", "generation_engine"),
    ),
    "evaluate-before": Reads(
        ("models", "data", "generation", "evaluation"), (*_DEVICES, *_TEACHER, "train", "data_source")
    ),
    "evaluate-warmed": Reads(
        ("models", "data", "generation", "evaluation"),
        (*_DEVICES, *_TEACHER, "train", "data_source"),
        student=True,
    ),
    "evaluate-after": Reads(
        ("models", "data", "generation", "evaluation"),
        (
            *_DEVICES, *_TEACHER, "train", "data_source", "student", "student_layers", "layer_choice",
            "trust_remote_code",
        ),
        (STUDENT,),
    ),
    LAYERS: Reads(("models", "data"), (*_DEVICES, *_TEACHER, "dev", "test")),
    "evaluate-teacher": Reads(
        ("models", "data", "generation", "evaluation"),
        (*_DEVICES, *_TEACHER, "train", "data_source", "student_layers", "layer_choice", "trust_remote_code"),
    ),
}  # fmt: skip
# Whose results a step builds on without reading the data behind them: what both are made from must agree.
BUILDS_ON = {"train": ("measure", "rank")}
# What each step leaves: its result, then what an interrupted one may have begun; "*" stands for each set.
WRITES = {
    "warmup": (WARMED, "warmup"),
    "measure": ("difficulty.parquet", "difficulty.parts"),
    "measure-teacher": (TEACHER_SCORES, "teacher_scores.parts"),
    "rank": ("curriculum.json", "difficulty.png"),
    "train": ("student", "checkpoints", "metrics.jsonl"),
    "sft": ("student", "checkpoints", "metrics.jsonl"),
    "evaluate-before": ("scores/*-before.parquet",),
    "evaluate-warmed": ("scores/*-warmed.parquet",),
    "evaluate-after": ("scores/*-after.parquet",),
    "evaluate-teacher": ("scores/*-teacher.parquet",),
}
# What means nothing once a step is done anew.
SPOILS = {
    "warmup": ("measure", "evaluate-warmed"),
    "measure": ("measure-teacher", "rank"),
    "train": ("evaluate-after",),
    "sft": ("evaluate-after",),
}
OF_DISTILLING = ("warmup", "measure", "measure-teacher", "rank", "train")


def reads_of(step: str, config: RunConfig) -> Reads:
    """What a step is made from under these options."""
    if step != "rank" or is_measured(config.schedule):
        return READS[step]
    reads = READS["rank-unmeasured"]
    return reads if config.schedule.curriculum == "random" else replace(reads, but=(*reads.but, "seed"))


def spoiled_by(step: str, config: RunConfig) -> list[str]:
    """The steps that mean nothing once this one is done anew. An order that is not measured stays."""
    return [one for one in SPOILS.get(step, ()) if one != "rank" or is_measured(config.schedule)]


def results_of(step: str, config: RunConfig) -> list[str]:
    """The files and folders without which a step is not done."""
    result = WRITES[step][0]
    return [result.replace("*", one.name) for one in sets_of(config)] if "*" in result else [result]


def warms_up(config: RunConfig) -> bool:
    """Whether the student is warmed up before it is measured."""
    return config.warmup.warmup_epochs is not None or config.warmup.warmup_steps is not None
