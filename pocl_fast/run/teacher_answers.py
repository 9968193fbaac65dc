"""The training samples of a run with the teacher's answers as their references.

Knows how a run's options name the teacher. Does not know how answers are generated.
"""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.options.run import RunConfig


def answered(
    samples: SampleSet, teacher: Any, encoder: SampleEncoder, config: RunConfig, run: Any, *, precision: str, rows: int
) -> SampleSet:
    """The samples with the teacher's answers, generated once and kept in the folder of the `run`; `rows` are the
    student's. Every rank must call."""
    from pocl_fast.teacher.teacher import teacher_fingerprint
    from pocl_fast.training.given_teacher import answered_by_teacher

    return answered_by_teacher(
        samples,
        teacher,
        encoder,
        run / "teacher_answers",
        fingerprint=teacher_fingerprint(teacher, precision),
        options=SimpleNamespace(**asdict(config.generation), max_length=config.data.max_length),
        student_rows=rows,
    )
