"""Supervised fine-tuning in a run: the student learns the references of the training samples, without a teacher.

Knows the files that such a training leaves in a folder. Does not know which step of a run it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_fast.data.sample_set import SampleSet
from pocl_fast.inputs.adapters import check_merges
from pocl_fast.inputs.saved_adapters import is_adapted
from pocl_fast.run.context import RunContext
from pocl_fast.run.measure_step import length_facts
from pocl_fast.run.train_step import training_speed
from pocl_fast.run_directory.saved_student import save_student
from pocl_fast.system import ranks
from pocl_fast.training.checkpoints import checkpoints
from pocl_fast.training.metrics import read_metrics

if TYPE_CHECKING:
    from pocl_fast.training.arguments import PoclConfig


def fine_tune(
    context: RunContext,
    student: Any,
    arguments: PoclConfig,
    folder: Path,
    *,
    dev: SampleSet | None,
    merges: bool,
    merging: str,
) -> dict[str, Any]:
    """Trains `student`, which it changes, on the run's training samples -> `folder`/student, metrics.jsonl.

    Goes on from the newest checkpoint in the arguments' output_dir. Adapters are merged where the step `merges` them;
    `merging` says what needs that they can be. Gives facts for the step's stamp. Every rank must call.
    """
    from pocl_fast.training.stage_flow import MetricsFile
    from pocl_fast.training.trainer import PoclTrainer

    ranks.from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    metrics = folder / "metrics.jsonl"
    callbacks = [MetricsFile(metrics)]
    samples = context.train_set
    arguments.precision = context.precision.name  # the run's choice, not one for this folder
    trainer = PoclTrainer(student, None, arguments, samples, dev, context.encoder, callbacks=callbacks)
    context.precision.set_modes()  # of the run, which has timed more than a name says
    if is_adapted(trainer.model):
        check_merges(trainer.model, merging)
    trainer.train(resume_from_checkpoint=True)
    save_student(trainer.model, context.tokenizer, folder, merges=merges, say=context.say)
    losses = [record["ce"] for record in read_metrics(metrics) if "ce" in record] if metrics.exists() else []
    facts = {"steps": trainer.state.global_step, "samples": len(samples.encoded), "losses": losses[:1] + losses[-1:]}
    return facts | training_speed(metrics) | length_facts(context)


def remove_checkpoints(arguments: PoclConfig) -> None:
    """Deletes what was needed to resume only, once the step is stamped; best weights stay."""
    if ranks.is_first():
        for checkpoint in checkpoints(Path(str(arguments.output_dir))):
            shutil.rmtree(checkpoint)
