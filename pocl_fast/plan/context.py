"""A run that is looked at and not begun: its options, data and checks, without a run directory.

Knows what of a run may be missing. Does not know what is counted.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.cutting.layer_choice import check_choice
from pocl_fast.models import loading
from pocl_fast.models.precision import PRECISION_FILE
from pocl_fast.options.run import RunConfig
from pocl_fast.run.checks import Part, check
from pocl_fast.run.context import RunContext, Say
from pocl_fast.settings.configuration import from_options, settled
from pocl_fast.system.errors import InputError
from pocl_fast.templates.template_date import DATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_fast.training.arguments import PoclConfig


class PlanContext(RunContext):
    """A run's options and data, with `folder` in place of the run directory `output`, which is only read."""

    def __init__(self, output: Path | None, folder: Path, config: RunConfig, say: Say) -> None:
        """Raises `InputError` as `RunContext` does. Nothing is measured for a plan: a student has the even layers."""
        check_choice(config.models)
        self.output, self.layer_choice = output, config.models.layer_choice
        config = settled(from_options({"layer_choice": "even"}, config))
        directory: Any = SimpleNamespace(path=folder)
        super().__init__(directory, config, say)
        for name in (DATE_FILE, PRECISION_FILE):  # the day on which the run was begun, and what it chose
            if output is not None and (output / name).is_file():
                shutil.copy(output / name, folder / name)

    @property
    def has_teacher(self) -> bool:
        return self.config.models.teacher is not None

    @property
    def has_student(self) -> bool:
        """Whether the options say what the student is."""
        chosen = self.config.models
        return chosen.student is not None or (chosen.teacher is not None and chosen.student_layers is not None)

    @property
    def has_dev(self) -> bool:
        """Whether the options say which samples are held out."""
        return bool(self.config.data.dev) or self.config.data.held_out is not None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer; the teacher's, which must be the same, where no student is named yet."""
        chosen = self.config.models
        source = chosen.student or chosen.teacher
        if source is None:
            raise InputError("give --teacher or --student: their tokenizer says how long the samples are")
        tokenizer: PreTrainedTokenizerBase = loading.load_tokenizer(source, trust_remote_code=chosen.trust_remote_code)
        return tokenizer

    def _kept_student(self, *, warmed: bool) -> LoadedModel:
        """The student as it is given: a plan warms none up, and its sizes are those of the warmed-up one."""
        return super()._kept_student(warmed=False)

    def check(self) -> PoclConfig:
        """Raises `InputError` for what `distill` would refuse before its first step; what needs a part that is not
        named is left out. The trainer's arguments."""
        named: dict[Part, bool] = {"teacher": self.has_teacher, "student": self.has_student, "dev": self.has_dev}
        return check(self, missing=[part for part, is_named in named.items() if not is_named])
