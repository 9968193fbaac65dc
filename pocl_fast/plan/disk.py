"""What a run writes: the teacher's cache, checkpoints, the student; and whether the disk has room for it.

Knows what these files hold. Does not know what is computed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.inputs.saved_adapters import adapter_bytes, is_adapted, saved_bytes
from pocl_fast.models.parameters import num_parameters
from pocl_fast.options.training import CacheOptions
from pocl_fast.plan.shapes import distinct
from pocl_fast.plan.warmup import WarmupPlan
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.cache import bytes_needed
from pocl_fast.teacher.shards import HIDDEN_DTYPES, Entries, HiddenEntries, TopKEntries
from pocl_fast.training.arguments import PoclConfig

FP32 = 4


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run writes; None for what depends on a model that is not named."""

    cache: int | None  # of the teacher, headers of its files (under 1 KiB each) aside
    cache_entries: str | None  # what is kept of a supervised token
    checkpoint: int | None  # one
    checkpoints: int  # that are there at a time
    best_weights: int | None  # of all stages, at most
    warmed: int | None  # the warmed-up student, which stays
    student: int | None  # as it is saved
    saved: str | None  # how that is
    peak: int  # all of this at once
    free: int  # of the file system that --output is on
    place: str  # the folder that was asked

    @property
    def fits(self) -> bool:
        return self.peak <= self.free


def disk_plan(
    student: Any | None,
    teacher: Any | None,
    encoded: Sequence[EncodedSample],
    arguments: PoclConfig,
    *,
    tokenizer: Any,
    state: float,
    saves: int,
    evaluations: int,
    warmup: WarmupPlan | None,
    output: Path | None,
) -> DiskPlan:
    """The numbers of a run. Models are on the meta device; `state` are the optimizer's bytes a trained weight, `saves`
    the checkpoints that are written in all, `evaluations` those of the dev set in training."""
    place = _existing(output)
    entries = None if teacher is None else entries_of(teacher, arguments)
    cache = None if entries is None else bytes_needed(entries, list({s.fingerprint: s for s in encoded}.values()))
    checkpoint = best = whole = warmed = saved_as = None
    kept = 0 if str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) == "no" else saves
    if arguments.save_total_limit is not None:
        kept = min(kept, arguments.save_total_limit + 1)  # an old one goes once the new one is whole
    if student is not None:
        trained = FP32 * sum(p.numel() for p in distinct(student) if p.requires_grad)
        words, adapted = _saved_bytes(tokenizer), is_adapted(student)
        saved = adapter_bytes(student) if adapted else FP32 * num_parameters(student)
        state_file = 0 if arguments.save_only_model else int(state * trained / FP32)
        checkpoint = saved + state_file + words
        best = trained * _most_best(arguments, evaluations, kept)
        whole = words + (saved_bytes(student, whole=arguments.merge_adapters) if adapted else saved)
        saved_as = _how_saved(student, whole=arguments.merge_adapters) if adapted else "whole"
        if warmup is not None:
            warmed = words + (saved_bytes(student, whole=True) if adapted else saved)
    peak = (cache or 0) + kept * (checkpoint or 0) + (best or 0) + (whole or 0)
    if warmup is not None:  # its checkpoints are gone when the training begins
        peak = (warmed or 0) + max(peak, warmup.checkpoints * (checkpoint or 0))
    return DiskPlan(
        cache=cache,
        cache_entries=None if entries is None else entries.name,
        checkpoint=checkpoint,
        checkpoints=kept,
        best_weights=best,
        warmed=warmed,
        student=whole,
        saved=saved_as,
        peak=peak,
        free=shutil.disk_usage(place).free,
        place=str(place),
    )


def _how_saved(adapted: Any, *, whole: bool) -> str:
    """In words what is saved of a student with adapters, as `save_adapted` decides."""
    if whole:
        return "whole, adapters merged"
    named = adapted.active_peft_config.base_model_name_or_path
    return "adapters" if named else "adapters, and the model they are for"


def _most_best(arguments: PoclConfig, evaluations: int, kept: int) -> int:
    """How many files of a stage's best weights there are at most: one a stage, and of the running stage one more for
    each checkpoint that was saved before another evaluation was better."""
    if not evaluations or arguments.stage_weights == "last":
        return 0
    stages = 1 if arguments.curriculum == "none" else arguments.stages
    return min(evaluations, stages + max(0, kept - 1))


def entries_of(teacher: Any, options: CacheOptions | PoclConfig) -> Entries:
    """What the cache keeps of a token of this teacher. Raises `InputError` for a top-k that is more than there is."""
    rows, hidden_size = teacher.get_output_embeddings().weight.shape
    if options.cache_mode == "hidden":
        return HiddenEntries(hidden_size, HIDDEN_DTYPES[options.cache_dtype])
    if options.cache_top_k > rows:
        raise InputError(f"a top-k of {options.cache_top_k}: must be within 1 and the vocabulary's {rows} tokens")
    return TopKEntries(options.cache_top_k)


def _saved_bytes(tokenizer: Any) -> int:
    with tempfile.TemporaryDirectory(prefix="pocl-fast-") as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _existing(output: Path | None) -> Path:
    """The output folder, or the first above it that is there."""
    place = (output or Path()).expanduser().absolute()
    return next(path for path in (place, *place.parents) if path.is_dir())
