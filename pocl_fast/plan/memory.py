"""The memory that each step of a run takes at its peak: weights, copies, caches of keys and values, activations.

Knows in what precision a run holds what, and when. Does not know how large a forward's tensors are (meter.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pocl_fast.answers.decoding import CPU_STEP_ROWS, generation_batches
from pocl_fast.answers.likelihood import ROWS_OF_LOGITS, TOKENS_A_BATCH
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.packed_forward import decoder_of
from pocl_fast.models.parameters import num_parameters
from pocl_fast.models.precision import Precision
from pocl_fast.plan.meter import Peak, forward_peak, training_peak
from pocl_fast.plan.shapes import distinct
from pocl_fast.plan.step_plan import Batches
from pocl_fast.system.memory import GROWTH

FP32 = 4
COPIES = "linear layers laid out anew"
QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes a weight of a linear layer; NF4 has a scale for each 64


@dataclass(frozen=True)
class StepMemory:
    """The parts of a step's memory when it takes most, in bytes."""

    step: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a run takes. Models are on the meta device."""

    student: Any
    teacher: Any  # None where none is named, or it lies on another device
    cut: bool  # whether the student is cut from that teacher
    quantization: str
    precision: Precision
    batches: Batches
    tokens: int  # of all training samples
    prompts: Sequence[Sequence[int]]  # that are answered
    max_new_tokens: int
    batch_size: int  # of answering
    batch_tokens: int
    top_k: bool
    checkpointing: bool
    accumulates: bool
    state: float  # bytes of the optimizer's state a trained weight
    evaluates: bool  # the dev set, in training
    measures: bool  # the difficulty of the training samples
    scores_teacher: bool  # to measure difficulty
    evaluates_teacher: bool  # on the held-out samples
    kept_states: int  # bytes of its hidden states there that are kept, in main memory
    warms_up: bool  # whether the student is fine-tuned before it is measured
    distils: bool  # whether the training uses a teacher; else its loss is cross-entropy alone
    base: int  # bytes of the process before models are loaded; 0 on a GPU

    @property
    def on_cpu(self) -> bool:
        return self.precision.device.type == "cpu"

    def bytes_of(self, peak: Peak) -> int:
        """What a peak takes where the run is."""
        return peak.resident if self.on_cpu else peak.alive

    @property
    def bf16(self) -> bool:
        """Whether autocast rounds, which it does on a GPU alone."""
        return not self.on_cpu and self.precision.name == "bf16"


def states_bytes(sets: Sequence[Sequence[EncodedSample]], teacher: Any) -> int:
    """Bytes of the teacher's hidden states on the samples of the sets, in fp32; evaluations keep `KEPT_BYTES` of them
    at most."""
    tokens = sum(one.supervised_count for of_set in sets for one in of_set)
    return FP32 * tokens * int(teacher.get_output_embeddings().weight.shape[-1])


def memory_plan(sizes: Sizes) -> list[StepMemory]:
    """The peak of each step of `distill`, in their order."""
    name = "measure, evaluate" if sizes.measures else "evaluate"
    found = [StepMemory("warm up", _supervised(sizes, evaluates=False))] if sizes.warms_up else []
    if sizes.prompts:
        found.append(StepMemory(name, _measuring(sizes)))
    if sizes.teacher is not None and sizes.scores_teacher:
        found.append(StepMemory("measure the teacher", _scoring(sizes)))
    if sizes.teacher is not None and sizes.evaluates_teacher:
        found.append(StepMemory("evaluate with the teacher", _comparing(sizes)))
    if not sizes.distils:
        return [*found, StepMemory("train", _supervised(sizes, evaluates=sizes.evaluates))]
    if sizes.teacher is None:
        return found
    return [*found, StepMemory("load the teacher", _loading(sizes)), StepMemory("train", _training(sizes))]


def _measuring(sizes: Sizes) -> dict[str, int]:
    """Answering beside the copies of the student's linear layers; the teacher is there where the student is cut from
    it."""
    parts = _start(sizes)
    if sizes.cut and sizes.teacher is not None:
        parts["teacher's weights"] = _teacher_weights(sizes)
    answering = _answering(sizes)
    scores = _forward(sizes, sizes.student, min(TOKENS_A_BATCH, sizes.tokens)) + 2 * _logits(sizes, ROWS_OF_LOGITS)
    copies = {name: size for name, size in answering.items() if name == COPIES}
    if scores + sum(copies.values()) > sum(answering.values()):
        return parts | copies | {"scores: hidden states, logits": scores}
    return parts | answering


def _supervised(sizes: Sizes, *, evaluates: bool) -> dict[str, int]:
    """A step of cross-entropy alone, or an evaluation between two; the teacher is there where the student was cut from
    it."""
    parts = _start(sizes) | _of_steps(sizes)
    if sizes.cut and sizes.teacher is not None:
        parts["teacher's weights"] = _teacher_weights(sizes)
    step, answering = _step(sizes, teacher_columns=0), _answering(sizes) if evaluates else {}
    if sum(answering.values()) > step:
        return parts | {f"evaluation: {name}": size for name, size in answering.items()}
    return parts | {"gradients, activations, loss": step}


def _of_steps(sizes: Sizes) -> dict[str, int]:
    """What a training holds between its steps, beside the models."""
    trained = sum(p.numel() for p in distinct(sizes.student) if p.requires_grad)
    parts = {"optimizer's state": int(sizes.state * trained)}
    return parts | ({"freed, not yet given back, at most": GROWTH} if sizes.on_cpu else {})


def _step(sizes: Sizes, *, teacher_columns: int) -> int:
    """Bytes of forward, loss and backward of the largest micro-batch."""
    peak = training_peak(
        sizes.student,
        sum(map(len, sizes.batches.largest)),
        sum(one.supervised_count for one in sizes.batches.largest),
        teacher_columns=teacher_columns,
        device=sizes.precision.device,
        bf16=sizes.bf16,
        checkpointing=sizes.checkpointing,
        accumulates=sizes.accumulates,
    )
    return sizes.bytes_of(peak)


def _forward(sizes: Sizes, model: Any, tokens: int) -> int:
    """Bytes of a decoder's forward over a packed row."""
    return sizes.bytes_of(forward_peak(model, 1, tokens, bf16=sizes.bf16)[0])


def _scoring(sizes: Sizes) -> dict[str, int]:
    parts = _start(sizes) | {"teacher's weights": _teacher_weights(sizes)}
    if sizes.on_cpu:
        parts[COPIES] = FP32 * (_linear(sizes.student) + _linear(sizes.teacher))
    tokens = min(TOKENS_A_BATCH, sizes.tokens)
    forwards = sum(_forward(sizes, model, tokens) for model in (sizes.student, sizes.teacher))
    return parts | {"hidden states and logits": forwards + 4 * _logits(sizes, ROWS_OF_LOGITS)}


def _comparing(sizes: Sizes) -> dict[str, int]:
    """The larger of the student's divergence from the teacher, and of the teacher's own answers."""
    scoring, parts = _scoring(sizes), _start(sizes) | {"teacher's weights": _teacher_weights(sizes)}
    answering = parts | _answering(replace(sizes, student=sizes.teacher))
    return max(scoring, answering, key=lambda one: sum(one.values()))


def _loading(sizes: Sizes) -> dict[str, int]:
    """On a CPU the teacher's layers are there twice while they are laid out anew."""
    parts = _start(sizes) | {"teacher's weights": _teacher_weights(sizes)}
    if sizes.on_cpu and sizes.quantization == "none":
        parts["teacher's layers laid out anew"] = _laid_out(sizes)
    return parts


def _training(sizes: Sizes) -> dict[str, int]:
    """The largest of a step, of an evaluation between steps, and of a batch of the teacher's."""
    parts = _start(sizes) | _of_steps(sizes) | {"teacher's weights": _kept_teacher(sizes)}
    tokens = sum(map(len, sizes.batches.largest))
    supervised = sum(one.supervised_count for one in sizes.batches.largest)
    head = causal_lm(sizes.teacher).get_output_embeddings().weight
    step = _step(sizes, teacher_columns=0 if sizes.top_k else len(head))
    step += FP32 * supervised * head.shape[1]  # the teacher's hidden states
    of_teacher = _forward(sizes, sizes.teacher, tokens)
    answering = _answering(sizes) if sizes.evaluates else {}
    if sum(answering.values()) > max(step, of_teacher):
        return parts | {f"evaluation: {name}": size for name, size in answering.items()}
    if of_teacher > step:
        return parts | {"teacher's hidden states": of_teacher}
    return parts | {"gradients, activations, loss": step}


# ---- parts ----


def _start(sizes: Sizes) -> dict[str, int]:
    started = {"process with data": sizes.base} if sizes.base else {}
    if sizes.kept_states and sizes.on_cpu:
        started["teacher's states of held-out samples"] = sizes.kept_states
    return {**started, "student's weights": FP32 * num_parameters(sizes.student)}


def _answering(sizes: Sizes) -> dict[str, int]:
    """Decoding the batch that takes most: the copies of linear layers, keys and values, the prompts' forward."""
    parts: dict[str, int] = {}
    if sizes.on_cpu:
        parts[COPIES] = FP32 * _linear(sizes.student)
    batches = generation_batches(
        sizes.prompts,
        batch_size=sizes.batch_size,
        max_new_tokens=sizes.max_new_tokens,
        batch_tokens=sizes.batch_tokens,
        most_padding=CPU_STEP_ROWS * sizes.max_new_tokens if sizes.on_cpu else None,
    )
    sized = [(len(batch), max(len(sizes.prompts[i]) for i in batch)) for batch in batches]
    rows, longest = max(sized, key=lambda one: one[0] * (one[1] + sizes.max_new_tokens))
    peak, stays = forward_peak(sizes.student, rows, longest, bf16=sizes.bf16, cache=True)
    output = rows * longest * causal_lm(sizes.student).get_output_embeddings().weight.shape[1] * FP32
    cache = max(0, stays - output)
    parts["keys and values"] = cache * (longest + sizes.max_new_tokens) // longest
    parts["prompts' hidden states, logits"] = sizes.bytes_of(peak) - cache + _logits(sizes, rows)
    return parts


def _logits(sizes: Sizes, rows: int) -> int:
    return FP32 * rows * len(causal_lm(sizes.student).get_output_embeddings().weight)


def _linear(model: Any) -> int:
    """Weights of linear layers; a tied lm_head counts, for its copy is one more."""
    return sum(m.weight.numel() for m in causal_lm(model).modules() if isinstance(m, nn.Linear))


def _teacher_weights(sizes: Sizes) -> int:
    """As it is loaded."""
    count, linear = num_parameters(sizes.teacher), _linear(decoder_of(sizes.teacher))
    whole = 2 if sizes.bf16 else FP32
    if sizes.quantization != "none":
        return int(whole * (count - linear) + QUANTISED[sizes.quantization] * linear)
    return whole * count


def _laid_out(sizes: Sizes) -> int:
    return sizes.precision.frozen_dtype.itemsize * _linear(decoder_of(sizes.teacher))


def _kept_teacher(sizes: Sizes) -> int:
    """As it stays in training: on a CPU its linear layers are there as they were laid out alone."""
    if not sizes.on_cpu or sizes.quantization != "none":
        return _teacher_weights(sizes)
    return _laid_out(sizes) + FP32 * (num_parameters(sizes.teacher) - _linear(decoder_of(sizes.teacher)))


def room(device: torch.device) -> tuple[str, int]:
    """What memory a run has here, and how many bytes of it are free or can be freed."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    return "main memory", int(psutil.virtual_memory().available)


def answered_prompts(*sets: Sequence[EncodedSample]) -> list[tuple[int, ...]]:
    """The prompts that are answered: of the training samples, and of the held-out ones."""
    return [one.prompt_ids for encoded in sets for one in encoded]
