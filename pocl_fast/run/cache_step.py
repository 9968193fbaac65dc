"""`pocl-fast cache`: the teacher runs over the training samples ahead of training. It is work that leaves no stamp."""

from __future__ import annotations

from pocl_fast.run.context import RunContext


def cache_step(context: RunContext) -> None:
    """Computes what the teacher's cache lacks of the training samples -> teacher_cache/."""
    context.directory.check_kind("train")
    encoded = context.train_set.encoded
    context.check_vocabularies()
    context.directory.record(context.config)
    teacher = context.take_cached_teacher()
    with context.precision.autocast():
        teacher.fill(encoded)
    size = teacher.cache.nbytes() / 2**20
    context.say(f"cache: {len(encoded)} samples, {size:.1f} MiB in {teacher.cache.folder}")
