"""`pocl-fast sft`: one step that fine-tunes a model on the references, in a run directory without a teacher.

Knows which options such a run has. Does not know how a training is done (fine_tuning.py).
"""

from __future__ import annotations

from pocl_fast.run.context import RunContext
from pocl_fast.run.fine_tuning import fine_tune, remove_checkpoints
from pocl_fast.run.train_step import trainer_arguments


def sft_step(context: RunContext) -> None:
    """Fine-tunes the student that the options name -> student/, metrics.jsonl; resumes from the newest checkpoint."""
    arguments = trainer_arguments(context)
    if not context.begins("sft", "student"):
        return
    _, dev = context.train_set, context.dev_set  # what is wrong with a file is raised before models load
    context.check_named_model()
    with context.directory.timed("sft") as facts:
        student, merging = context.take_student().model, "the evaluation of the trained student merges its adapters"
        merges = bool(arguments.merge_adapters)
        facts |= fine_tune(context, student, arguments, context.path, dev=dev, merges=merges, merging=merging)
    remove_checkpoints(arguments)


def check_sft(context: RunContext) -> None:
    """Reads data and tokenizer, and raises `InputError` for what is wrong with them before any step."""
    context.directory.check_kind("sft")
    trainer_arguments(context)
    context.check_engine()
    _, _ = context.train_file, context.dev_set
    context.check_named_model()
