"""The teacher of a training: what it is needed for, what a user may give as one, and what is made of it.

Knows models, names and options. Does not know how a step is computed, nor how difficulty is measured.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pocl_fast.answers.answerer import Answerer, SampleAnswerOptions
from pocl_fast.answers.engine import own_ends
from pocl_fast.curriculum.signals import teacher_columns
from pocl_fast.curriculum.stages import Curriculum, is_measured, stages_over
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.inputs import usable
from pocl_fast.inputs.left_to_right import check_left_to_right
from pocl_fast.inputs.vocabulary import configured_rows
from pocl_fast.models import loading
from pocl_fast.models.precision import Precision
from pocl_fast.models.probing import placeable
from pocl_fast.records.bad_records import some_lines
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.loading import SPREAD, WITH_STUDENT, cached_teacher, load_teacher, teacher_place
from pocl_fast.teacher.pair import Place, Vocabulary, check_same_vocabulary, check_tokens
from pocl_fast.teacher.references import teacher_answers
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.templates.chat_template import unused_template
from pocl_fast.training.arguments import PoclConfig

Say = Callable[[str], object]


# -- whether one is needed ---------------------------------------------------------------------------------------------


def _alphas(args: PoclConfig, curriculum: Curriculum | None) -> list[float]:
    """Each stage's weight of cross-entropy."""
    if curriculum is None:  # which values count is for the stages to say; these are over any samples
        curriculum = stages_over(np.arange(args.stages), np.zeros(args.stages), args)
    return [stage.alpha for stage in curriculum.stages]


def measures(args: PoclConfig, curriculum: Curriculum | None = None) -> bool:
    """Whether the trainer measures the difficulty of samples itself."""
    return args.remeasure or (curriculum is None and is_measured(args))


def uses_of_teacher(args: PoclConfig, curriculum: Curriculum | None = None) -> dict[str, str]:
    """What a training with these arguments needs a teacher for: options, and why in words; nothing for supervised
    fine-tuning."""
    uses = {}
    if low := [alpha for alpha in _alphas(args, curriculum) if alpha < 1]:
        uses["alpha"] = f"alpha {min(low):.4g} leaves a part of the loss to the divergence from a teacher"
    if args.rollouts != "none":
        uses["rollouts"] = f"rollouts {args.rollouts!r} compare the student's own answers with a teacher"
    if args.data_source == "teacher":
        uses["data_source"] = "data_source 'teacher' trains on a teacher's answers"
    if measures(args, curriculum) and (columns := teacher_columns(args.signals)):
        uses["signals"] = f"the signals {args.signals!r} read a teacher ({', '.join(columns)})"
    return uses


def needed_teacher(teacher: Any, args: PoclConfig, curriculum: Curriculum | None, say: Say) -> Any:
    """The teacher that was given, or None where nothing needs one, which a line says of one that was given.

    Raises `InputError` where one is needed and none is given, for what is no teacher, and for options that do not go
    with it.
    """
    if isinstance(teacher, type) and issubclass(teacher, Teacher):
        raise InputError("teacher is the class Teacher, and no Teacher: give Teacher(model, folder), a model or a name")
    uses = uses_of_teacher(args, curriculum)
    if teacher is None and uses:
        raise InputError(
            f"teacher is missing, and {'; '.join(uses.values())}: give a model, its name, or a Teacher."
            " Supervised fine-tuning, which needs none, is alpha 1 in every stage (alpha=[1.0, 1.0])"
        )
    if teacher is not None and not uses:
        say("the teacher is not used: alpha is 1 in every stage, so the loss is cross-entropy alone (supervised)")
        return None
    if teacher is not None:
        check_teacher_argument(teacher, args)
    return teacher


# -- what is given, and what is made of it -----------------------------------------------------------------------------


def check_teacher_argument(teacher: Any, args: PoclConfig) -> None:
    """Raises `InputError` for a teacher that is none, and for options that only one given by name has."""
    if isinstance(teacher, (str, os.PathLike)):
        return
    made = isinstance(teacher, Teacher)
    too_late = {"teacher_quantization": args.teacher_quantization != "none"}
    too_late["teacher_device"] = args.teacher_device != WITH_STUDENT if made else args.teacher_device == SPREAD
    for name in (name for name, given in too_late.items() if given):
        raise InputError(
            f"{name}={getattr(args, name)!r} is for a teacher that is given by name: give teacher its name, or load the"
            f" model as you want it and leave {name} out"
        )
    if not made:
        usable.check_model(teacher, "teacher", may_be_offloaded=True)


def teacher_of(
    teacher: Any,
    encoder: SampleEncoder,
    args: PoclConfig,
    precision: Precision,
    samples: SampleSet,
    place: Place,
    student_rows: int,
    say: Say,
) -> Teacher:
    """The teacher with its cache in the output folder. `student_rows` are those of the student's lm_head."""
    if isinstance(teacher, Teacher):
        return teacher
    folder, by_name = Path(str(args.output_dir)), isinstance(teacher, (str, os.PathLike))
    if by_name:
        trust, name = args.trust_remote_code, os.fspath(teacher)
        theirs = loading.load_tokenizer(name, trust_remote_code=trust)
        check_same_vocabulary(encoder.tokenizer, theirs, samples, place, say)
        if line := unused_template(encoder.chat, args.template, theirs, args.chat_template):
            say(line)
        configured = Vocabulary("teacher", configured_rows(name, trust_remote_code=trust))
        # here, for a quantised teacher runs when it is made
        check_tokens(samples, configured, encoder.tokenizer, place)
        teacher = load_teacher(
            name,
            folder / "teacher",
            precision=precision,
            quantization=args.teacher_quantization,  # type: ignore[arg-type]  # checked by PoclConfig
            where=args.teacher_device,
            probe_samples=samples.encoded,
            trust_remote_code=trust,
            say=say,
        )
    elif placeable(teacher):
        teacher = teacher.to(teacher_place(args.teacher_device, args.device))
    check_left_to_right(teacher, "teacher")
    return cached_teacher(
        teacher,
        folder / "teacher_cache",
        args,
        precision=precision,
        device=args.device,
        keep_body=args.rollouts != "none",
        owned=by_name,
        student_rows=student_rows,
        say=say,
    )


@contextlib.contextmanager
def open_cache(teacher: Teacher | None, samples: Sequence[EncodedSample]) -> Iterator[None]:
    """Within it the teacher's cache, where there is a teacher, writes; it has room for these samples first."""
    if teacher is None:
        yield
        return
    teacher.cache.reserve(samples)
    with teacher.cache:
        yield


def answered_by_teacher(
    samples: SampleSet,
    teacher: Any,
    encoder: SampleEncoder,
    folder: Path,
    *,
    fingerprint: str,
    options: SampleAnswerOptions,
    student_rows: int,
) -> SampleSet:
    """The samples with the teacher's greedy answers as their references, generated once and kept in `folder`.

    Answers have tokens alone for which the student has one of its `student_rows`. The student learns to end where its
    teacher ends, and from then on `encoder` ends answers there too. Where answers are empty the end token alone is
    learnt, which a line counts. `fingerprint` identifies the teacher. Every rank must call.
    """
    encoder.stop_also_at(own_ends(teacher))
    ask = Answerer.of(teacher, encoder, options, temperature=0.0, rows=student_rows)
    encoded = teacher_answers(samples.encoded, folder, ask, teacher=fingerprint, say=say)
    texts = encoder.answer_texts([[id_ for id_ in one.response_ids if id_ != encoder.end_id] for one in encoded])
    answers = {one.index: text for one, text in zip(encoded, texts, strict=True)}
    empty = [index for index, text in answers.items() if not text]
    if empty and ranks.is_first():
        found = [samples.samples[index] for index in empty]
        where = some_lines([sample.line for sample in found], found[0].unit)
        say(
            f"the teacher's answer to {len(empty)} of {len(answers)} prompts is empty ({where}):"
            " there the student learns to say nothing. Look at the teacher's chat template, or"
            " train on the data's own answers (data_source=data)"
        )
    known = [
        replace(s, references=(answers[s.index],), answer=None) if s.index in answers else s for s in samples.samples
    ]
    return SampleSet(known, encoded)
