"""What a `PoclTrainer` is made from, out of what a user gives: models or their names, paths or records, options.

Does not know how difficulty is measured, nor how a step is computed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from pocl_fast.answers.evaluation import unseen_by_rouge
from pocl_fast.curriculum.pacing import paced
from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.cutting.layer_choice import cut_student, measuring_of
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder, encoder_of
from pocl_fast.data.packed import Rows
from pocl_fast.data.sample_set import SampleSet, read_set, same_samples_lines
from pocl_fast.inputs import adapters, usable
from pocl_fast.inputs.left_to_right import check_left_to_right
from pocl_fast.inputs.positions import check_positions
from pocl_fast.inputs.trainable import check_trains, make_trainable
from pocl_fast.inputs.vocabulary import check_special_tokens, rowless_line, rows_of
from pocl_fast.models import loading
from pocl_fast.models.lm_head import adds_router_loss, causal_lm, check_head
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.models.parameters import as_trainable
from pocl_fast.models.precision import Precision
from pocl_fast.models.probing import placeable
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.teacher import loading as teachers
from pocl_fast.teacher.pair import (
    Place,
    Vocabulary,
    check_apart,
    check_pair,
    check_tokens,
    places,
)
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig, value_of
from pocl_fast.training.given_teacher import answered_by_teacher, needed_teacher, teacher_of, uses_of_teacher


@dataclass(frozen=True, eq=False)
class TrainingParts:
    """The models and data of a training."""

    student: Any  # with its adapters
    tokenizer: Any
    encoder: SampleEncoder
    samples: SampleSet
    dev: SampleSet | None
    precision: Precision
    packed: Rows  # how the student's batches are laid out
    router: bool  # whether the loss of the student's router over experts is added
    teacher: Teacher | None  # None where nothing of the training itself needs one
    distils: bool  # whether losses compare the student with the teacher; else they are cross-entropy alone


def training_parts(
    student: Any,
    teacher: Any,
    args: PoclConfig,
    training: Any,
    dev: Any,
    tokenizer: Any,
    peft_config: Any,
    curriculum: Curriculum | None,
) -> TrainingParts:
    """Loads what is given by name, reads what is given as a path or as records, and checks that all fits together.

    `tokenizer` may be the `SampleEncoder` of a run, which has said how the two models differ. With `data_source`
    "teacher" the teacher answers the training prompts here. Every rank must call. Raises `InputError` for what does not
    fit, before weights of a model given as an object are changed.
    """
    teacher = needed_teacher(teacher, args, curriculum, _first_says)
    check_apart(student, teacher)
    check_student_argument(student, args)
    precision = teachers.precision_with(teacher, student, args, _first_says)
    peft_config = adapters.configuration_of(args, peft_config)
    folder, said = Path(str(args.output_dir)), isinstance(tokenizer, SampleEncoder)
    encoder = tokenizer if said else encoder_of(tokenizer_of(student, tokenizer, args), args, folder, _first_says)
    tokenizer = encoder.tokenizer
    samples = sample_set(training, encoder, args, "train_dataset")
    held_out = None if dev is None else sample_set(dev, encoder, args, "eval_dataset", scored=True)
    if not said:
        sets = [] if held_out is None else [("eval_dataset", held_out.used())]
        for same in same_samples_lines(("train_dataset", samples.used()), sets):
            _first_says(same)
    place = places(training, "train_dataset")
    student = student_of(student, tokenizer, peft_config, args, samples, place, precision)
    rows = rows_of(student)
    check_special_tokens(tokenizer, rows.embedding, "student")
    check_tokens(samples, Vocabulary("student", rows.both), tokenizer, place)
    if held_out is not None:
        check_tokens(held_out, Vocabulary("student", rows.both), tokenizer, places(dev, "eval_dataset"))
    if line := rowless_line(tokenizer, rows.both, "student"):
        _first_says(line)
    half = torch.autocast(args.device.type, dtype=torch.float16) if args.fp16 else precision.autocast()
    with half:
        check_head(causal_lm(student), "student")
    kept, uses = None, uses_of_teacher(args, curriculum)
    if teacher is not None:
        kept = teacher_of(teacher, encoder, args, precision, samples, place, rows.lm_head, _first_says)
        answers = "data_source" in uses
        check_pair(student, kept, tokenizer, samples, place, answers=answers, say=None if said else _first_says)
    check_lengths(student, kept, args, samples, held_out)
    if kept is not None and "data_source" in uses:
        asked: dict[str, Any] = {"fingerprint": kept.fingerprint, "options": args, "student_rows": rows.both}
        samples = answered_by_teacher(samples, kept.model, encoder, folder / "teacher_answers", **asked)
        kept = kept if len(uses) > 1 else None  # all it was for is done
    make_trainable(student, _first_says, mixes=args.device.type == "cuda" and (args.fp16 or precision.name == "bf16"))
    with half:
        packed = packing_ready(causal_lm(student), _first_says, device=args.device, trains=True)
        router = adds_router_loss(causal_lm(student), _first_says)
    compares = not {"alpha", "rollouts"}.isdisjoint(uses)
    return TrainingParts(student, tokenizer, encoder, samples, held_out, precision, packed, router, kept, compares)


def _first_says(text: str) -> None:
    if ranks.is_first():
        say(text)


def check_student_argument(model: Any, args: PoclConfig) -> None:
    """Raises `InputError` for a student that is given as an object and is none, and for options that only one given by
    name has."""
    if isinstance(model, (str, os.PathLike)):
        return
    if args.student_layers is not None:
        raise InputError(
            f"student_layers={args.student_layers} cuts a student that is given by name: give model its name, or leave"
            " student_layers out"
        )
    usable.check_model(model, "model")


def tokenizer_of(model: Any, tokenizer: Any, args: PoclConfig) -> Any:
    """The student's tokenizer, which has a padding token: the one given, or that of a student given by name."""
    if tokenizer is not None:
        usable.check_tokenizer(tokenizer, "processing_class")
    elif isinstance(model, (str, os.PathLike)):
        tokenizer = loading.load_tokenizer(os.fspath(model), trust_remote_code=args.trust_remote_code)
    else:
        raise InputError("processing_class is missing: give the student's tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def student_of(
    model: Any, tokenizer: Any, peft_config: Any, args: PoclConfig, samples: SampleSet, place: Place, how: Precision
) -> Any:
    """The student to train, with its adapters. One that is given by name is loaded in fp32, and cut to
    `student_layers`."""
    if isinstance(model, (str, os.PathLike)):
        name, folder = os.fspath(model), Path(str(args.output_dir))
        model = loading.load_model(name, device=args.device, trust_remote_code=args.trust_remote_code)
        if args.student_layers is not None:
            check_tokens(samples, Vocabulary("student", rows_of(model).both), tokenizer, place)
            model = cut_student(model, args, folder, measuring_of(name, samples.encoded, how.autocast), _first_says)
        model = as_trainable(model)
        usable.check_model(model, "model")
    if peft_config is not None:
        argument = adapters.named_by(args)
        model = adapters.with_adapters(model, peft_config, argument, seed=args.seed, merges=args.merge_adapters)
        _first_says(f"student: {adapters.described(model)}")
    elif getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False):
        raise InputError("model is quantised: only adapters on it can learn, so give a peft_config, or load it whole")
    peft_of = getattr(model, "active_peft_config", None)
    if getattr(peft_of, "is_prompt_learning", False):
        raise InputError(
            f"{type(peft_of).__name__} puts tokens before the prompt, which packed batches have no room for"
        )
    if args.device.type == "cuda" and not sharded_later(args) and placeable(model):
        model = model.to(args.device)  # how it attends is chosen by where it is
    check_left_to_right(model, "model")
    loading.make_savable(model, _first_says, "student")
    loading.check_saved(tokenizer)
    check_trains(model)
    return model


def check_evaluations(args: PoclConfig, dev: Any) -> None:
    """Raises `InputError` where options need evaluations and there are none."""
    if args.eval_strategy != "no":
        if dev is None:
            raise InputError(f'eval_strategy="{value_of(args.eval_strategy)}" needs samples: give eval_dataset')
        return
    if args.rollouts == "adaptive":
        raise InputError('rollouts="adaptive" follows the dev loss: give eval_dataset and eval_strategy')
    if args.stage_weights == "best":
        raise InputError('stage_weights="best" needs evaluations: give eval_dataset and eval_strategy')


def check_optimisation(args: PoclConfig) -> None:
    """Makes the optimizer and the learning rate's schedule for one weight, before anything is computed.

    Raises `InputError` where transformers cannot.
    """
    needs_model = any(part in value_of(args.optim) for part in ("galore", "apollo", "lomo", "layerwise"))
    try:
        kind, given = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([torch.nn.Parameter(torch.zeros(1))], **given)
    except ImportError as error:
        raise InputError(f"optim {value_of(args.optim)}: {error}") from error
    except Exception as error:  # whatever an optimizer says of its arguments
        if not needs_model:
            raise InputError(f"optim {value_of(args.optim)}: {error}") from error
    try:
        _factor_over(args, 10)(5)
    except InputError:
        raise
    except Exception as error:  # whatever a schedule says of its arguments
        raise InputError(f"lr_scheduler_type {value_of(args.lr_scheduler_type)}: {error}") from error


def check_lengths(
    student: Any, teacher: Teacher | None, args: PoclConfig, training: SampleSet, dev: SampleSet | None
) -> None:
    """Raises `InputError` where a sample, or a prompt and its answer, has more tokens than a model has positions."""
    lengths = [len(sample) for sample in training.encoded]
    prompts = [len(sample.prompt_ids) for known in (training, dev) if known for sample in known.encoded]
    check_positions(causal_lm(student), max([*lengths, max(prompts) + args.max_new_tokens]), "student")
    if teacher is not None and teacher.has_body:
        check_positions(causal_lm(teacher.model), max(lengths), "teacher")


def sharded_later(args: PoclConfig) -> bool:
    """Whether the student goes to the GPUs in parts."""
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    return bool(args.fsdp) or by_launcher or args.deepspeed is not None


def sample_set(data: Any, encoder: SampleEncoder, args: PoclConfig, name: str, *, scored: bool = False) -> SampleSet:
    """Samples as tokens, from a path, records or samples; `scored`: answers will be compared with their references."""
    if isinstance(data, SampleSet):
        return data
    name = str(data) if isinstance(data, (str, Path)) else name
    made, report = read_set(data, encoder, args, name)
    if ranks.is_first():
        print(report.describe(name))
        if scored and (line := unseen_by_rouge(made, args.rouge_tokenizer, name)):  # type: ignore[arg-type]
            print(line)
    return made


def schedule_of(args: PoclConfig, curriculum: Curriculum, encoded: Sequence[EncodedSample]) -> Schedule:
    """The steps of a training on these samples, which the curriculum orders."""
    size = BatchSize(
        args.per_device_train_batch_size, args.tokens_per_batch, args.gradient_accumulation_steps, args.world_size
    )
    seed = args.seed if args.data_seed is None else args.data_seed
    lengths = {sample.index: len(sample) for sample in encoded}
    return paced(curriculum, lengths, size, args, seed=seed, reorders=args.remeasure)


def learning_rate_factor(args: PoclConfig, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate's factor by step: `lr_scheduler_type` over each stage anew, or over all of them. That these
    arguments make one is checked by `check_optimisation`."""

    over = functools.cache(functools.partial(_factor_over, args))  # asked at every step

    def factor(step: int) -> float:
        if step >= schedule.total_steps:
            return 0.0
        if not args.fresh_learning_rate:
            return over(schedule.planned_total)(step)
        place = schedule.place(step)
        return over(place.stage_steps)(place.step_in_stage)

    return factor


def _factor_over(args: PoclConfig, steps: int) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup, special = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, special)  # type: ignore[arg-type]
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"lr_scheduler_type {value_of(args.lr_scheduler_type)} depends on more than the step: take another"
        )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
