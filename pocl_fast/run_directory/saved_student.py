"""The student that a run leaves: the folder student/, whole or as adapters.

Knows files of the run directory. Does not know how the student was trained.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocl_fast.cutting.layer_choice import RECORD as LAYERS
from pocl_fast.inputs.saved_adapters import is_adapted, save_adapted
from pocl_fast.models.parameters import unsharded
from pocl_fast.system import ranks


def save_student(student: Any, tokenizer: Any, run: Path, *, merges: bool, say: Callable[[str], object]) -> None:
    """Writes student/ whole: a crash leaves the folder as it was or none. Adapters are written as such, or merged into
    their model where the run `merges` them. Every rank must call."""
    if is_adapted(student):
        ranks.from_first(lambda: _write(student, tokenizer, run, merges, say))
        return
    with unsharded(student) as whole:
        ranks.from_first(lambda: _write(whole, tokenizer, run, merges, say))


def _write(student: Any, tokenizer: Any, run: Path, merges: bool, say: Callable[[str], object]) -> None:
    partial, folder = run / "student.partial", run / "student"
    shutil.rmtree(partial, ignore_errors=True)
    if is_adapted(student):
        how = save_adapted(student, partial, whole=merges, place=folder)
        say(f"train: the student is saved {how}, in {folder}")
    else:
        student.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if (run / LAYERS).exists():  # which layers of its source it has
        shutil.copy(run / LAYERS, partial)
    shutil.rmtree(folder, ignore_errors=True)  # there if a crash came just before the stamp
    os.replace(partial, folder)
