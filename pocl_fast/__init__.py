"""pocl-fast: fused distillation losses and the POCL curriculum for language models.

The public names; each is imported from its module when it is first used, so that importing pocl_fast costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl_fast.curriculum import (
        Curriculum,
        RankFusion,
        Stage,
        baby_steps,
        no_curriculum,
        reciprocal_rank_fusion,
    )
    from pocl_fast.errors import InputError, Interrupted
    from pocl_fast.linear_loss import linear_distillation_loss
    from pocl_fast.losses import DistillationLoss, LossOutput, distillation_loss, shift_labels
    from pocl_fast.objectives import Objective
    from pocl_fast.rouge import RougeL, rouge_l
    from pocl_fast.samples import SampleEncoder, SampleSet, read_samples
    from pocl_fast.teacher import Teacher
    from pocl_fast.teacher_cache import TeacherCache
    from pocl_fast.teacher_shards import HiddenEntries, TopK, TopKEntries
    from pocl_fast.teachers import DenseTeacher, LinearTeacher, TopKTeacher
    from pocl_fast.trainer import PoclTrainer
    from pocl_fast.training_arguments import PoclConfig
    from pocl_fast.vocabulary_parallel import VocabularyShards

__version__ = "0.1.0"

__all__ = [
    "Curriculum",
    "DenseTeacher",
    "DistillationLoss",
    "HiddenEntries",
    "InputError",
    "Interrupted",
    "LinearTeacher",
    "LossOutput",
    "Objective",
    "PoclConfig",
    "PoclTrainer",
    "RankFusion",
    "RougeL",
    "SampleEncoder",
    "SampleSet",
    "Stage",
    "Teacher",
    "TeacherCache",
    "TopK",
    "TopKEntries",
    "TopKTeacher",
    "VocabularyShards",
    "baby_steps",
    "distillation_loss",
    "linear_distillation_loss",
    "no_curriculum",
    "read_samples",
    "reciprocal_rank_fusion",
    "rouge_l",
    "shift_labels",
]

_MODULES = {
    "curriculum": ("Curriculum", "RankFusion", "Stage", "baby_steps", "no_curriculum", "reciprocal_rank_fusion"),
    "errors": ("InputError", "Interrupted"),
    "linear_loss": ("linear_distillation_loss",),
    "losses": ("DistillationLoss", "LossOutput", "distillation_loss", "shift_labels"),
    "objectives": ("Objective",),
    "rouge": ("RougeL", "rouge_l"),
    "samples": ("SampleEncoder", "SampleSet", "read_samples"),
    "teacher": ("Teacher",),
    "teacher_cache": ("TeacherCache",),
    "teacher_shards": ("HiddenEntries", "TopK", "TopKEntries"),
    "teachers": ("DenseTeacher", "LinearTeacher", "TopKTeacher"),
    "trainer": ("PoclTrainer",),
    "training_arguments": ("PoclConfig",),
    "vocabulary_parallel": ("VocabularyShards",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
