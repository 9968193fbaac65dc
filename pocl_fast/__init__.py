"""pocl-fast: fused distillation losses and the POCL curriculum for language models.

The public names; each is imported from its module when it is first used, so that importing pocl_fast costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pocl_fast.version import __version__ as __version__

if TYPE_CHECKING:
    from pocl_fast.answers.rouge import RougeL, rouge_l
    from pocl_fast.curriculum.fusion import RankFusion, reciprocal_rank_fusion
    from pocl_fast.curriculum.stages import Curriculum, Stage, baby_steps, no_curriculum
    from pocl_fast.data.encoding import SampleEncoder
    from pocl_fast.data.sample_set import SampleSet
    from pocl_fast.loss.dense import DistillationLoss, distillation_loss, shift_labels
    from pocl_fast.loss.linear import linear_distillation_loss
    from pocl_fast.loss.objective import Objective
    from pocl_fast.loss.output import LossOutput
    from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher, TopKTeacher
    from pocl_fast.loss.vocabulary_shards import VocabularyShards
    from pocl_fast.records.samples import read_samples
    from pocl_fast.system.errors import InputError, Interrupted
    from pocl_fast.teacher.cache import TeacherCache
    from pocl_fast.teacher.shards import HiddenEntries, TopK, TopKEntries
    from pocl_fast.teacher.teacher import Teacher
    from pocl_fast.training.arguments import PoclConfig
    from pocl_fast.training.trainer import PoclTrainer

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
    "curriculum.fusion": ("RankFusion", "reciprocal_rank_fusion"),
    "curriculum.stages": ("Curriculum", "Stage", "baby_steps", "no_curriculum"),
    "system.errors": ("InputError", "Interrupted"),
    "loss.linear": ("linear_distillation_loss",),
    "loss.dense": ("DistillationLoss", "distillation_loss", "shift_labels"),
    "loss.objective": ("Objective",),
    "loss.output": ("LossOutput",),
    "answers.rouge": ("RougeL", "rouge_l"),
    "data.encoding": ("SampleEncoder",),
    "data.sample_set": ("SampleSet",),
    "records.samples": ("read_samples",),
    "teacher.teacher": ("Teacher",),
    "teacher.cache": ("TeacherCache",),
    "teacher.shards": ("HiddenEntries", "TopK", "TopKEntries"),
    "loss.teacher_output": ("DenseTeacher", "LinearTeacher", "TopKTeacher"),
    "training.trainer": ("PoclTrainer",),
    "training.arguments": ("PoclConfig",),
    "loss.vocabulary_shards": ("VocabularyShards",),
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
