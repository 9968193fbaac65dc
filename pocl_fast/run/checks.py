"""What a run refuses before its first step, in one list: for the run itself, and for a plan of it.

Knows which checks there are, and their order. Does not know how each is done (context.py, train_step.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import numpy as np

from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import stages_over
from pocl_fast.inputs.vocabulary import configured_layers, configured_parameters, configured_rows
from pocl_fast.models import loading
from pocl_fast.run.context import RunContext
from pocl_fast.run.scored_sets import check_sets
from pocl_fast.run.train_step import trainer_arguments
from pocl_fast.run.warmup_step import warmup_arguments
from pocl_fast.run_directory.directory import required
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.loading import SPREAD, teacher_place
from pocl_fast.teacher.pair import Vocabulary, check_top_k

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
    _check_teacher_device(context)
    context.check_engine()
    count = len(context.train_file.encoded)
    if "dev" not in missing:
        _ = context.dev_set
        context.say_same_samples()
    stages_over(np.arange(count), np.zeros(count), context.config.schedule)
    if {"teacher", "student"}.isdisjoint(missing):
        context.check_vocabularies()
        check_sizes(context)
        if "dev" not in missing:
            check_teacher_reads_sets(context)
    else:
        context.check_named_model()
    return arguments


def check_sizes(context: RunContext) -> None:
    """Raises `InputError` where --student-layers asks for more layers than there are, and for a top-k that does not
    stand for the student's vocabulary. Says how the two models differ, as far as their configurations tell."""
    chosen = context.config.models
    student, keep, teacher = context.student_source, chosen.student_layers, required(chosen.teacher, "--teacher")
    trusted = {"trust_remote_code": chosen.trust_remote_code}
    ours, theirs = (configured_rows(one, **trusted) for one in (student, teacher))
    if ours is not None and theirs is not None and context.config.cache.cache_mode == "topk":
        check_top_k(context.config.cache.cache_top_k, ours, theirs)
    has = configured_layers(student, **trusted)
    if has is not None and keep is not None and keep > has:
        raise InputError(f"--student-layers {keep}: the model to cut from has {has} layers, {student}")
    if loading.same_source(student, teacher):
        context.say_pair()  # a cut student is smaller
        if keep in (None, has):
            how = f"give --student-layers below its {has} layers" if has else "give --student-layers"
            context.say(
                f"the student is the teacher itself, {chosen.teacher}, whole: it will be no faster. For a smaller"
                f" one {how}, or another --student"
            )
        return
    if keep is None and ours is not None and theirs is not None:
        small, large = (configured_parameters(one, **trusted) for one in (student, teacher))
        if small is not None and large is not None:
            context.say_pair(ours, theirs, small, large)


def check_teacher_reads_sets(context: RunContext) -> None:
    """Raises `InputError` where the teacher, which is to be scored, has no row for a token of an evaluation set."""
    if not context.scores_teacher:
        return
    chosen = context.config.models
    rows = configured_rows(required(chosen.teacher, "--teacher"), trust_remote_code=chosen.trust_remote_code)
    try:
        check_sets(context.evaluation_sets, Vocabulary("teacher", rows), context.tokenizer)
    except InputError as error:
        raise InputError(f"{error}, or leave the teacher's scores out (--no-score-teacher)") from error


def _check_teacher_device(context: RunContext) -> None:
    """Raises `InputError` where the teacher is to lie on a device that is not there."""
    if (where := context.config.models.teacher_device) != SPREAD:
        teacher_place(where, context.device)
