"""The warm-up of a run: the student is fine-tuned on the references before it is measured.

Knows which options a warm-up has of its own. Does not know how a training is done (fine_tuning.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pocl_fast.options.answers import DifficultyOptions
from pocl_fast.options.run import RunConfig
from pocl_fast.options.training import LossOptions, RolloutOptions, ScheduleOptions, StageOptions
from pocl_fast.run.context import RunContext
from pocl_fast.run.fine_tuning import fine_tune, remove_checkpoints
from pocl_fast.run_directory.step_inputs import NOT_IN_WARMUP, WARMED, warms_up
from pocl_fast.system.errors import InputError

if TYPE_CHECKING:
    from pocl_fast.training.arguments import PoclConfig


def warmup_step(context: RunContext) -> None:
    """Fine-tunes the student as it was given, where the options ask for it -> warmup/student, warmup/metrics.jsonl;
    resumes from the newest checkpoint."""
    arguments = warmup_arguments(context)
    if arguments is None or not context.begins("warmup", WARMED):
        return
    samples = context.train_set  # what is wrong with a file is raised before models load
    _check_student(context)
    context.say(f"warm-up: {described(context.config)} over {len(samples.encoded):,} training samples")
    with context.directory.timed("warmup") as facts:
        student, folder = context.take_student(given=True).model, context.path / "warmup"
        merging = "the warm-up merges its adapters into the student"
        facts |= fine_tune(context, student, arguments, folder, dev=None, merges=True, merging=merging)
    remove_checkpoints(arguments)
    context.say(f"warm-up: done, {facts['steps']} steps; the student is in {context.path / WARMED}")


def _check_student(context: RunContext) -> None:
    if context.config.models.teacher is None:
        context.check_named_model()
    else:
        context.check_vocabularies()


def warmup_arguments(context: RunContext) -> PoclConfig | None:
    """The arguments of the warm-up's training; None where the options ask for no warm-up. Raises `InputError` for
    options that do not go together."""
    from pocl_fast.training.arguments import PoclConfig

    check_warmup(context.config)
    if not warms_up(context.config):
        return None
    return PoclConfig.of_run(warmup_config(context.config), context.path / "warmup" / "checkpoints")


def check_warmup(config: RunConfig) -> None:
    """Raises `InputError` for options of a warm-up that do not go together."""
    asked = config.warmup
    if asked.warmup_epochs is not None and asked.warmup_steps is not None:
        raise InputError(
            f"--warmup-epochs {asked.warmup_epochs} and --warmup-steps {asked.warmup_steps} both say how long the"
            " student is warmed up: give one of them"
        )
    if asked.warmup_learning_rate is not None and not warms_up(config):
        raise InputError("--warmup-learning-rate is for a warm-up: give --warmup-epochs or --warmup-steps too")


def warmup_config(config: RunConfig) -> RunConfig:
    """The options of the warm-up's training: the run's, but for what distilling alone has. One stage over all samples,
    cross-entropy alone, the last weights."""
    asked, others = config.warmup, config.trainer.set
    rate = asked.warmup_learning_rate or config.optimisation.learning_rate
    return replace(
        config,
        difficulty=DifficultyOptions(),
        schedule=ScheduleOptions(curriculum="none", stages=1, temperature=[1.0], alpha=[1.0]),
        loss=LossOptions(),
        stages=StageOptions(
            epochs_per_stage=asked.warmup_epochs or 1, steps_per_stage=asked.warmup_steps, stage_weights="last"
        ),
        optimisation=replace(config.optimisation, learning_rate=rate),
        logging=replace(config.logging, report_to=["none"]),
        rollouts=RolloutOptions(),
        trainer=replace(
            config.trainer, set={name: value for name, value in others.items() if not name.startswith(NOT_IN_WARMUP)}
        ),
    )


def described(config: RunConfig) -> str:
    """The warm-up in words."""
    count, what = config.warmup.warmup_epochs, "pass"
    if count is None:
        count, what = config.warmup.warmup_steps, "step"
    plural = "" if count == 1 else "es" if what == "pass" else "s"
    rate = config.warmup.warmup_learning_rate or config.optimisation.learning_rate
    return f"{count} {what}{plural} of supervised fine-tuning, learning rate {rate:g},"
