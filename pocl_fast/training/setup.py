"""What a `PoclTrainer` is made from, out of what a user gives: models by name, records, and a measured difficulty."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from pocl_fast.answers.answerer import Answerer
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.curriculum.signals import chosen_signals, teacher_columns
from pocl_fast.curriculum.stages import Curriculum, make_curriculum, stages_over
from pocl_fast.data.encoding import EncodedSample, SampleEncoder, SampleSet, encode_all
from pocl_fast.data.records import read_samples, samples_from
from pocl_fast.models import loading
from pocl_fast.models.cut import as_trainable
from pocl_fast.models.fingerprints import weights_fingerprint
from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.precision import Precision
from pocl_fast.models.unsharded import unsharded
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text
from pocl_fast.teacher.loading import cached_teacher, load_teacher
from pocl_fast.teacher.references import teacher_answers
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig

if TYPE_CHECKING:
    from pocl_fast.training.trainer import PoclTrainer


def student_of(model: Any, tokenizer: Any, peft_config: Any, args: PoclConfig) -> tuple[Any, Any]:
    """The student to train, and its tokenizer; fp32 where it is given by name."""
    if isinstance(model, str):
        tokenizer = tokenizer or loading.load_tokenizer(model)
        model = as_trainable(loading.load_model(model, device=args.device))
    if tokenizer is None:
        raise InputError("processing_class is missing: give the student's tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if peft_config is not None:
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise InputError('peft_config needs peft: pip install "pocl-fast[peft]"') from error
        model = get_peft_model(model, peft_config)
    peft_of = getattr(model, "active_peft_config", None)
    if getattr(peft_of, "is_prompt_learning", False):
        raise InputError(
            f"{type(peft_of).__name__} puts tokens before the prompt, which packed batches have no room for"
        )
    if args.device.type == "cuda" and not sharded_later(args) and placeable(model):
        model = model.to(args.device)  # how it attends is chosen by where it is
    return model, tokenizer


def check_lengths(student: Any, teacher: Teacher, args: PoclConfig, training: SampleSet, dev: SampleSet | None) -> None:
    """Raises `InputError` where a sample, or a prompt and its answer, has more tokens than a model has positions."""
    lengths = [len(sample) for sample in training.encoded]
    prompts = [len(sample.prompt_ids) for known in (training, dev) if known for sample in known.encoded]
    loading.check_positions(causal_lm(student), max([*lengths, max(prompts) + args.max_new_tokens]), "student")
    if teacher.has_body:
        loading.check_positions(causal_lm(teacher.model), max(lengths), "teacher")


def sharded_later(args: PoclConfig) -> bool:
    """Whether the student goes to the GPUs in parts."""
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    return bool(args.fsdp) or by_launcher or args.deepspeed is not None


def teacher_of(teacher: Any, tokenizer: Any, args: PoclConfig, precision: Precision, samples: SampleSet) -> Teacher:
    """The teacher with its cache in the output folder."""
    if isinstance(teacher, Teacher):
        return teacher
    if teacher is None:
        raise InputError("teacher is missing: give a model, its name, or a Teacher")
    folder, by_name = Path(str(args.output_dir)), isinstance(teacher, str)
    first_says = say if ranks.is_first() else lambda _: None
    if by_name:
        loading.check_same_vocabulary(tokenizer, loading.load_tokenizer(teacher))
        teacher = load_teacher(
            teacher,
            folder / "teacher",
            precision=precision,
            quantization=args.teacher_quantization,  # type: ignore[arg-type]  # checked by PoclConfig
            where=args.teacher_device,
            probe_samples=samples.encoded,
            say=first_says,
        )
    elif placeable(teacher) and args.teacher_device == "student":
        teacher = teacher.to(args.device)
    return cached_teacher(
        teacher,
        folder / "teacher_cache",
        args,
        precision=precision,
        device=args.device,
        keep_body=args.rollouts != "none",
        owned=by_name,
        say=first_says,
    )


def placeable(model: Any) -> bool:
    """Whether a model's place is ours to choose: nobody has spread, quantised or sharded it."""
    chosen = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return not chosen and not any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


def sample_set(data: Any, encoder: SampleEncoder, args: PoclConfig, name: str) -> SampleSet:
    """Samples as tokens, from a path, records or samples."""
    if isinstance(data, SampleSet):
        return data
    if isinstance(data, (str, Path)):
        samples, name = read_samples(data), str(data)
    elif hasattr(data, "__iter__"):
        samples = samples_from(data, name)
    else:
        raise InputError(f"{name} must be a path, records or a SampleSet, got {type(data).__name__}")
    encoded, report = encode_all(
        samples,
        encoder,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        long_prompts=args.long_prompts,  # type: ignore[arg-type]
        name=name,
    )
    if ranks.is_first():
        print(report.describe(name))
    return SampleSet(samples, encoded)


def answered_by_teacher(
    samples: SampleSet, teacher: Any, encoder: SampleEncoder, folder: Path, *, fingerprint: str, options: Any
) -> SampleSet:
    """The samples with the teacher's greedy answers as their references, generated once and kept in `folder`.

    `options` has `max_new_tokens`, `max_length`, `generation_batch_size` and `generation_batch_tokens`. Every rank must
    call.
    """
    tokenizer: Any = encoder.tokenizer
    ask = Answerer.of(teacher, encoder, options, temperature=0.0)
    encoded = teacher_answers(samples.encoded, folder, ask, teacher=fingerprint, say=say)
    texts = tokenizer.batch_decode([one.response_ids for one in encoded], skip_special_tokens=True)
    answers = {one.index: text.strip() for one, text in zip(encoded, texts, strict=True)}
    known = [replace(s, references=(answers[s.index],)) if s.index in answers else s for s in samples.samples]
    return SampleSet(known, encoded)


def measured_curriculum(trainer: PoclTrainer, folder: Path, *, made_from: str | None = None) -> Curriculum:
    """The curriculum by the difficulty of the samples for the student as it is; measured once, and kept in `folder`.

    `made_from` identifies what it is measured on; None trusts what is there. Raises `InputError` where the folder holds
    that of something else.
    """
    args, samples = trainer.args, trainer.samples
    known, key = folder / "curriculum.json", folder / "measured_from.txt"
    if made_from is not None and ranks.from_first(lambda: key.is_file() and key.read_text() != made_from):
        raise InputError(
            f"{folder} holds the difficulty of other samples or of another student: give another output_dir, or delete"
            " that folder"
        )
    if args.curriculum == "none":
        index = np.array([sample.index for sample in samples.encoded])
        return stages_over(index, np.zeros(len(index)), args)
    if known.is_file():
        return Curriculum.load(known)
    from pocl_fast.curriculum.measurer import (  # these need pyarrow, and a curriculum that is given does not
        measure,
        rows_of,
    )
    from pocl_fast.curriculum.scores import read_scores

    if teacher_columns(args.signals):
        raise InputError("signals that need the teacher are measured by `pocl-fast measure`: give its curriculum")
    if made_from is not None and ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(key, made_from)
    model: Any = trainer.model
    was_training, home = model.training, next(model.parameters()).device
    moves = home.type == "cpu" and args.device.type == "cuda" and placeable(model)  # sharded only when it trains
    model.eval()
    if moves:
        model.to(args.device)
    table = folder / "difficulty.parquet"
    with unsharded(trainer.model) as student, trainer.accelerator.autocast():
        measure(
            LoadedModel(student, trainer.packed),
            rows_of(samples.samples, samples.encoded),
            len(samples.encoded),
            trainer.encoder,
            table,
            engine=TorchEngine.of(student, trainer.encoder, args),
            max_new_tokens=args.max_new_tokens,
        )
    model.train(was_training)
    if moves:
        model.to(home)
    curriculum = make_curriculum(read_scores(table, chosen_signals(args.signals)), args)
    if ranks.is_first():
        curriculum.save(known)
    ranks.barrier()
    return curriculum


def measured_from(trainer: PoclTrainer) -> str:
    """Identifies what a student's difficulty is measured on: its weights, the samples and the settings."""
    args = trainer.args
    settings = (args.signals, args.stages, args.rrf_k, args.temperature, args.alpha, args.max_new_tokens)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(weights_fingerprint(causal_lm(trainer.model)).encode())
    for sample in trainer.samples.encoded:
        digest.update(sample.fingerprint)
    return digest.hexdigest()


def schedule_of(args: PoclConfig, curriculum: Curriculum, encoded: Sequence[EncodedSample]) -> Schedule:
    """The steps of a training on these samples, which the curriculum orders."""
    return Schedule(
        curriculum,
        {sample.index: len(sample) for sample in encoded},
        BatchSize(
            args.per_device_train_batch_size, args.tokens_per_batch, args.gradient_accumulation_steps, args.world_size
        ),
        seed=args.seed if args.data_seed is None else args.data_seed,
        epochs=args.passes,
        stage_steps=args.steps_per_stage,
        within_stage=args.within_stage,  # type: ignore[arg-type]  # checked by PoclConfig
        reorders=args.remeasure,
    )


def learning_rate_factor(args: PoclConfig, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate's factor by step: `lr_scheduler_type` over each stage anew, or over all of them.

    Raises `InputError` for a type that does not follow from the step alone.
    """

    @functools.cache  # asked at every step
    def over(steps: int) -> Callable[[int], float]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        warmup, special = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, special)  # type: ignore[arg-type]
        if not isinstance(scheduler, LambdaLR):
            raise InputError(f"lr_scheduler_type {args.lr_scheduler_type} depends on more than the step: take another")
        factor: Callable[[int], float] = scheduler.lr_lambdas[0]
        return factor

    def factor(step: int) -> float:
        if step >= schedule.total_steps:
            return 0.0
        if not args.fresh_learning_rate:
            return over(schedule.planned_total)(step)
        place = schedule.place(step)
        return over(place.stage_steps)(place.step_in_stage)

    over(1)
    return factor
