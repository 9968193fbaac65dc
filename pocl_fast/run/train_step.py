"""The train step of a run: a trainer made from the run's options, and what it leaves in the directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.inputs.adapters import check_merges, configuration_of
from pocl_fast.inputs.saved_adapters import is_adapted
from pocl_fast.inputs.vocabulary import rows_of
from pocl_fast.models.loading import resolve
from pocl_fast.models.parameters import num_parameters
from pocl_fast.run.context import RunContext
from pocl_fast.run.measure_step import length_facts
from pocl_fast.run_directory.saved_student import save_student
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.training.checkpoints import checkpoints
from pocl_fast.training.metrics import read_metrics

if TYPE_CHECKING:
    from pocl_fast.training.arguments import PoclConfig
    from pocl_fast.training.trainer import PoclTrainer


def train_step(context: RunContext) -> None:
    """Trains the student along curriculum.json -> student/, metrics.jsonl; resumes from the newest checkpoint."""
    arguments = trainer_arguments(context)  # what is wrong with them is raised before the step begins
    if not context.begins("train", "student"):
        return
    curriculum, _ = ranked_samples(context), context.dev_set  # what is wrong with a file is raised before models load
    context.say_same_samples()
    context.check_vocabularies()
    with context.directory.timed("train") as facts:
        trainer = make_trainer(context, curriculum, arguments)
        if is_adapted(trainer.model):
            check_merges(trainer.model, "the evaluation of the trained student merges its adapters")
        trainer.train(resume_from_checkpoint=True)
        merges = arguments.merge_adapters
        save_student(trainer.model, context.tokenizer, context.path, merges=merges, say=context.say)
        facts |= training_speed(context.path / "metrics.jsonl") | length_facts(context)
    if ranks.is_first():
        for checkpoint in checkpoints(context.path / "checkpoints"):  # needed to resume only; the best weights stay
            shutil.rmtree(checkpoint)


def ranked_samples(context: RunContext) -> Curriculum:
    """The order in which the samples are trained on. Raises `InputError` where it has samples that --train lacks."""
    path, known = context.path / "curriculum.json", context.train_file
    curriculum = Curriculum.load(path)
    if unknown := set(curriculum.order.tolist()) - {sample.index for sample in known.encoded}:
        raise InputError(
            f"{path} lists sample {min(unknown)}, which --train {context.config.data.train} does not have:"
            " run `pocl-fast measure` and `rank` on this file first"
        )
    return curriculum


def make_trainer(context: RunContext, curriculum: Curriculum, arguments: PoclConfig) -> PoclTrainer:
    """The trainer of a run, which owns its student and its teacher."""
    from pocl_fast.training.given_teacher import uses_of_teacher
    from pocl_fast.training.stage_flow import MetricsFile
    from pocl_fast.training.trainer import PoclTrainer

    samples, student = context.train_set, context.take_student().model
    uses = uses_of_teacher(arguments, curriculum)
    both = (student, context.teacher_model()) if uses else (student,)
    sizes = [num_parameters(model, adapters=False) for model in both]
    if uses:
        context.say_pair(*(rows_of(model).lm_head for model in both), *sizes)
    if resolve(context.student_source).adapter and configuration_of(arguments) is None:
        context.say(
            f"train: the adapters {context.student_source} are merged, and all weights of the student train: give"
            " --lora-rank to train new adapters on it"
        )
    theirs = f"teacher of {_millions(sizes[1])}" if uses else "alpha 1 in every stage: no teacher is used"
    context.say(
        f"train: student of {_millions(sizes[0])} parameters, {theirs};"
        f" on {context.device}, products of weights that train in {context.precision.of_training}"
    )
    arguments.computed_in = context.precision
    return PoclTrainer(
        student,
        context.take_cached_teacher() if uses else None,
        arguments,
        samples,
        context.dev_set,
        context.encoder,
        curriculum=curriculum,
        callbacks=[MetricsFile(context.path / "metrics.jsonl")],
    )


def trainer_arguments(context: RunContext) -> PoclConfig:
    """The trainer's arguments out of a run's options. Raises `InputError` for options that do not go together."""
    from pocl_fast.training.arguments import PoclConfig
    from pocl_fast.training.setup import check_optimisation, sharded_later

    arguments = PoclConfig.of_run(context.config, context.path / "checkpoints")
    check_optimisation(arguments)
    if configuration_of(arguments) is not None and sharded_later(arguments):
        raise InputError("a run trains adapters under DDP, and not under FSDP or DeepSpeed: leave these out")
    return arguments


def training_speed(metrics: Path) -> dict[str, float]:
    """How many tokens were trained on, and how many a second."""
    records = read_metrics(metrics) if metrics.exists() else []  # of a training that logs nothing
    steps = [record for record in records if "tokens" in record]
    tokens = sum(record["tokens"] for record in steps)
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in steps)
    return {"tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9)}


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count >= 50_000 else f"{count:,}"
