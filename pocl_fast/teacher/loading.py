"""From a teacher's name to the `Teacher` of a training: loads the model, lays out its layers and opens its cache.

Knows devices, quantisation and the options of the cache. Does not know what the teacher computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.inputs.vocabulary import rows_of, shapes_of
from pocl_fast.models import loading
from pocl_fast.models.frozen import drop_weights, freeze_linears
from pocl_fast.models.loading import Quantization
from pocl_fast.models.packed_forward import decoder_of
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.models.placement import Placement, choose_device
from pocl_fast.models.precision import Precision, choose_precision
from pocl_fast.models.quantised import load_quantised
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.pair import check_top_k
from pocl_fast.teacher.shards import HIDDEN_DTYPES
from pocl_fast.teacher.teacher import Teacher

WITH_STUDENT, SPREAD = "student", "spread"  # places of a teacher that are no device's name


class CacheSettings(Protocol):
    """What is kept on disk of the teacher: a run's options, a trainer's arguments."""

    @property
    def cache_mode(self) -> str: ...
    @property
    def cache_dtype(self) -> str: ...
    @property
    def cache_top_k(self) -> int: ...


def teacher_place(where: str, student: torch.device) -> torch.device:
    """The device that a teacher's place names, which is none of several. Raises `InputError` for one that is not
    there."""
    if where == WITH_STUDENT:
        return student
    try:
        return choose_device(where, option="teacher_device")
    except InputError as error:
        raise InputError(f"{error}; or give {WITH_STUDENT} (the student's device), or {SPREAD}") from error


def precision_with(teacher: Any, student: Any, args: Any, say: Callable[[str], object]) -> Precision:
    """How a training's products are computed: as its run has chosen, or those of a `Teacher` that was made for the same
    run; as its output folder says; or chosen now (see `choose_precision`), for the student, which may be a name. `args`
    are a trainer's.
    """
    made = teacher.computed_in if isinstance(teacher, Teacher) else args.computed_in
    if made is not None and made.device.type == args.device.type == "cpu":
        made.set_modes()
        return made
    shapes = functools.partial(shapes_of, student, trust_remote_code=args.trust_remote_code)
    asked = "fp32" if args.fp16 else args.precision
    return choose_precision(asked, args.device, Path(str(args.output_dir)), shapes=shapes, say=say)


def load_teacher(
    source: str,
    folder: Path,
    *,
    precision: Precision,
    quantization: Quantization = "none",
    where: str = WITH_STUDENT,
    probe_samples: Sequence[EncodedSample] = (),
    trust_remote_code: bool = False,
    say: Callable[[str], object] = print,
) -> Any:
    """Loads the teacher of this name. A quantised one is kept in `folder`, and its divergence from the full model is
    reported.

    `where` is "student" (the student's device), "spread" (over the GPUs, main memory and the disk, as far as each has
    room) or a device. Every rank must call. Raises `InputError` for what cannot be loaded, or not in this way.
    """
    on_gpu = precision.device.type == "cuda" and precision.name == "bf16"
    common: dict[str, Any] = {
        "dtype": torch.bfloat16 if on_gpu else torch.float32,
        "trust_remote_code": trust_remote_code,
    }
    if where == SPREAD:
        if quantization != "none":
            raise InputError("a quantised teacher lies on one device: give teacher_device a device, or no quantization")
        say(f"loading the teacher {source}, spread over the devices that have room")
        return loading.load_model(source, placement=Placement("auto", offload_folder=folder / "offloaded"), **common)
    device = teacher_place(where, precision.device)
    if quantization == "none":
        say(f"loading the teacher {source}")
        return loading.load_model(source, device=device, **common)
    say(f"loading the teacher {source} in {quantization}")
    return load_quantised(source, quantization, folder, device=device, probe_samples=probe_samples, say=say, **common)


def cached_teacher(
    model: Any,
    folder: Path,
    options: CacheSettings,
    *,
    precision: Precision,
    device: torch.device,
    keep_body: bool,
    owned: bool,
    student_rows: int,
    say: Callable[[str], object] = print,
) -> Teacher:
    """The teacher with its cache in `folder`. Its outputs lie on `device`. With `owned` nobody else reads the model's
    weights, and those that were laid out anew for a CPU are dropped. `student_rows` are those of the student's lm_head.
    Raises `InputError` where the cache cannot keep what such a student is to learn."""
    if options.cache_mode == "topk":
        check_top_k(options.cache_top_k, student_rows, rows_of(model).lm_head)
    with precision.autocast():
        packed = packing_ready(model, say)  # before layers are laid out anew, which may round their products
    frozen = freeze_linears(decoder_of(model), precision.frozen_dtype)  # the lm_head's products stay fp32
    mode = cast(Literal["hidden", "topk"], options.cache_mode)  # the options' own checks allow no other
    with precision.autocast():
        teacher = Teacher(
            model,
            folder,
            cache_dtype=HIDDEN_DTYPES[options.cache_dtype],
            cache_mode=mode,
            top_k=options.cache_top_k,
            student_entries=student_rows,
            precision=precision.of_teacher,
            device=device,
            keep_body=keep_body,
            packed=packed,
        )
    teacher.computed_in = precision
    if owned:
        drop_weights(frozen)
    return teacher
