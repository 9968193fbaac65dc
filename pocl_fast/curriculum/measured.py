"""The curriculum by the difficulty that a trainer measures itself: of its student, and against its teacher's cache.

Knows difficulty, stages, and the files that keep both. Does not know the optimisation.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from pocl_fast.answers import vllm
from pocl_fast.answers.engine import AnswerOptions, Engine
from pocl_fast.answers.likelihood import TEACHER_COLUMNS, TOKENS_A_BATCH, LoadedModel
from pocl_fast.answers.rouge_words import Tokenizer
from pocl_fast.curriculum.signals import TEACHER_SCORES, chosen_signals, teacher_columns, top_k_lacks
from pocl_fast.curriculum.stages import Curriculum, StageSettings, make_curriculum
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.packed import pack, token_budget_batches
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher
from pocl_fast.models.fingerprints import weights_fingerprint
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.models.lm_head import LmHead, causal_lm, lm_head
from pocl_fast.models.packed_forward import decoder_of, supervised_hidden
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text
from pocl_fast.teacher.shards import HiddenEntries
from pocl_fast.teacher.teacher import Teacher

if TYPE_CHECKING:
    from pocl_fast.curriculum.scores import SignalScores


class EngineOptions(AnswerOptions, Protocol):
    """What generates answers, and how long prompts and answers may be."""

    @property
    def generation_engine(self) -> Literal["auto", "torch", "vllm"]: ...
    @property
    def max_prompt_length(self) -> int: ...


class MeasureOptions(EngineOptions, StageSettings, Protocol):
    """How difficulty is measured, and how stages are made of it."""

    @property
    def signals(self) -> str: ...
    @property
    def measure_temperature(self) -> float: ...
    @property
    def measure_seed(self) -> int: ...
    @property
    def rouge_tokenizer(self) -> Tokenizer: ...


def measured_curriculum(
    student: contextlib.AbstractContextManager[LoadedModel],
    teacher: Teacher | None,
    samples: SampleSet,
    encoder: SampleEncoder,
    options: MeasureOptions,
    folder: Path,
    *,
    bf16: bool = False,
    made_from: str | None = None,
) -> Curriculum:
    """The curriculum by the difficulty of the samples for the student as it is now; measured once, kept in `folder`.

    `student` is entered where something is to be measured; with `bf16` vLLM, where it answers, computes in bf16. What
    signals read of the teacher is computed from its cache, which is filled first. `made_from` identifies what is
    measured; None trusts what the folder holds. Every rank must call. Raises `InputError` where the folder holds the
    difficulty of something else, and where the options cannot be followed.
    """
    known, key = folder / "curriculum.json", folder / "measured_from.txt"
    if made_from is not None and ranks.from_first(lambda: key.is_file() and key.read_text() != made_from):
        raise InputError(
            f"{folder} holds the difficulty of other samples, of another student or teacher, or by other options: give"
            " another output_dir, or delete that folder"
        )
    if known.is_file():
        return Curriculum.load(known)
    if made_from is not None and ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(key, made_from)
    # these need pyarrow, which a trainer with a curriculum does without
    from pocl_fast.curriculum.measurer import measure, rows_of, unseen_by_rouge
    from pocl_fast.curriculum.scores import read_scores

    table = folder / "difficulty.parquet"
    with student as loaded:
        with student_engine(loaded.model, encoder, options, bf16=bf16) as engine:
            measure(
                loaded,
                rows_of(samples.samples, samples.encoded),
                len(samples.encoded),
                encoder,
                table,
                engine=engine,
                max_new_tokens=options.max_new_tokens,
                temperature=options.measure_temperature,
                seed=options.measure_seed,
                rouge_tokenizer=options.rouge_tokenizer,
            )
        if teacher is not None and teacher_columns(options.signals):
            measure_cached_teacher(loaded, teacher, samples, folder / TEACHER_SCORES)
    scores = read_scores(table, chosen_signals(options.signals))
    curriculum = make_curriculum(scores, options)
    if ranks.is_first():
        curriculum.save(known)
        _describe(scores, folder)
        # a later measurement is of the same references
        if made_from is not None and (line := unseen_by_rouge(table, options.rouge_tokenizer, "train_dataset")):
            say(line)
    ranks.barrier()
    return curriculum


def measured_from(
    student: Any, teacher: Teacher | None, samples: Sequence[EncodedSample], options: MeasureOptions
) -> str:
    """Identifies what a student's difficulty is measured on: its weights, the samples, the options, and the teacher
    where a signal reads it."""
    named = {"max_new_tokens", *(n for one in (MeasureOptions, EngineOptions, StageSettings) for n in _properties(one))}
    settings = [(name, getattr(options, name)) for name in sorted(named)]
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(weights_fingerprint(causal_lm(student)).encode())
    if teacher_columns(options.signals) and teacher is not None:
        digest.update(teacher.fingerprint.encode())
    for sample in samples:
        digest.update(sample.fingerprint)
    return digest.hexdigest()


def _properties(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if isinstance(value, property)]


def check_measurable(student: Any, teacher: Teacher | None, options: MeasureOptions, device: torch.device) -> None:
    """Raises `InputError` where the difficulty cannot be measured as the options say: signals read the teacher and its
    cache lacks what they need, or vLLM is to answer and cannot."""
    vllm_answers(student, options, device)
    if not (columns := teacher_columns(options.signals)):
        return
    if teacher is None:
        raise InputError(f"the signals {options.signals!r} read a teacher ({', '.join(columns)}), and there is none")
    if not isinstance(teacher.cache.entries, HiddenEntries):
        raise InputError(top_k_lacks(columns))


@contextlib.contextmanager
def as_measured(model: Any, *, device: torch.device, movable: bool) -> Iterator[None]:
    """Within it the model is in evaluation mode, and on `device` where it waits for a GPU on the CPU and is `movable`;
    both are as before afterwards."""
    was_training, home = model.training, next(model.parameters()).device
    moves = movable and home.type == "cpu" and device.type == "cuda"
    model.eval()
    if moves:
        model.to(device)
    yield
    model.train(was_training)
    if moves:
        model.to(home)


# -- what answers ------------------------------------------------------------------------------------------------------


def vllm_answers(student: Any, options: EngineOptions, device: torch.device) -> bool:
    """Whether vLLM answers for the student. Raises `InputError` where it is asked for and cannot."""
    adapted = any(hasattr(module, "base_layer") for module in student.modules())  # by peft
    if adapted and options.generation_engine == "auto":
        return False
    if not vllm.chosen(options.generation_engine, device):
        return False
    if adapted:
        raise InputError("generation_engine=vllm does not load a student with adapters: give torch")
    return True


def student_engine(
    student: Any, encoder: SampleEncoder, options: EngineOptions, *, bf16: bool
) -> contextlib.AbstractContextManager[Engine]:
    """What generates the student's answers: vLLM with the student in it, in bf16 or fp32, or torch."""
    by_vllm = vllm_answers(student, options, next(student.parameters()).device)
    most = max(options.max_prompt_length, encoder.longest_prompt)
    return vllm.engine_of(student, encoder, options, max_prompt_length=most, by_vllm=by_vllm, bf16=bf16)


# -- the teacher -------------------------------------------------------------------------------------------------------


def measure_cached_teacher(student: LoadedModel, teacher: Teacher, samples: SampleSet, output: Path) -> None:
    """Writes `TEACHER_COLUMNS` of the samples (Parquet), as `measure_teacher` does, from the teacher's cache.

    The cache is filled first, so that the teacher's layers, which may have left memory, still run once a sample. Its
    rounding of the hidden states is in the result. Ranks and interruptions are as in `make_table`.
    """
    from pocl_fast.curriculum.measurer import rows_of, write_teacher_table

    if teacher.has_body:
        teacher.fill(samples.encoded)

    def scores(encoded: Sequence[EncodedSample]) -> dict[str, np.ndarray]:
        columns = {name: np.empty(len(encoded)) for name in TEACHER_COLUMNS}
        for batch in token_budget_batches([len(one) for one in encoded], max_tokens=TOKENS_A_BATCH):
            for name, means in _cached_scores(student, teacher, [encoded[i] for i in batch]).items():
                columns[name][batch] = means
        return columns

    rows = rows_of(samples.samples, samples.encoded)
    with frozen_linears(student.model):
        write_teacher_table(rows, len(samples.encoded), output, scores)


@torch.no_grad()
def _cached_scores(student: LoadedModel, teacher: Teacher, samples: Sequence[EncodedSample]) -> dict[str, list[float]]:
    """Each sample's means of `TEACHER_COLUMNS` over its response's tokens, nats."""
    batch = pack(samples).to(next(student.model.parameters()).device)
    hidden = supervised_hidden(decoder_of(student.model), batch, packed=student.packed)
    cached = teacher.hidden(samples)
    theirs = teacher.lm_head
    target = LinearTeacher(cached, theirs.weight, theirs.bias, theirs.logit_scale, theirs.logit_softcap)

    def compared(states: torch.Tensor, head: LmHead) -> dict[str, torch.Tensor]:
        return linear_distillation_loss(
            states,
            head.weight,
            target,
            batch.labels,
            Objective(alpha=1.0),
            reduction="none",
            student_bias=head.bias,
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
        ).per_token

    of_student, of_teacher = compared(hidden, lm_head(student.model)), compared(cached, theirs)
    values = {name: value(of_student, of_teacher) for name, value in TEACHER_COLUMNS.items()}
    return {
        name: [part.double().mean().item() for part in tokens.cpu().split(batch.counts)]
        for name, tokens in values.items()
    }


def _describe(scores: SignalScores, folder: Path) -> None:
    """Prints what was measured, and which signals tell little."""
    from pocl_fast.curriculum.blind_signals import signal_lines  # which needs pyarrow, as above

    means = ", ".join(
        f"{one.signal.name} {np.nanmean(values) if np.isfinite(values).any() else float('nan'):.4g}"
        for one, values in zip(scores.signals, scores.scores, strict=True)
    )
    say(f"difficulty: {len(scores.index)} samples measured, means {means}; kept in {folder}")
    for line in signal_lines(scores):
        say(f"difficulty: {line.text}")
