"""A transformers trainer whose checkpoints are complete or absent.

Knows when a trainer saves and resumes. Does not know what it trains.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from pocl_fast.inputs.saved_adapters import is_adapted, save_adapted
from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.probing import is_sharded
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json
from pocl_fast.system.seal import damage, disk_trouble, seal
from pocl_fast.training import checkpoints


class SavingTrainer(Trainer):
    """Writes each checkpoint under another name, seals it and renames it (see `checkpoints`)."""

    _saving_to: str | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return Path(str(self.args.output_dir))

    def before_saving(self) -> None:
        """Called on every rank before a checkpoint is written."""

    def write_state(self, checkpoint: Path) -> None:
        """Called on the first rank to add a subclass's own state to a checkpoint."""

    def remove_old(self) -> None:
        """Called on the first rank after a checkpoint was written."""
        checkpoints.remove_old(self.folder, self.args.save_total_limit)

    def found_checkpoint(self, chosen: str | bool | None) -> Path | None:
        """The checkpoint to resume from: a chosen folder, or with True the newest undamaged one; None for none.

        Raises `InputError` for a chosen one that is damaged, and where the folder holds checkpoints of later steps.
        """
        if not chosen:
            checkpoints.check_none_after(self.folder, -1)
            return None
        if chosen is True:
            return ranks.from_first(lambda: checkpoints.newest_whole(self.folder, say))
        if wrong := damage(Path(chosen)):
            raise InputError(f"cannot go on from checkpoint {chosen}: {wrong}")
        checkpoints.check_none_after(self.folder, checkpoints.step_of(Path(chosen)))
        return Path(chosen)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: transformers calls it before the checkpoint is in its place."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`. Adapters are merged where `merge_adapters` says so; the model that they are for is
        saved beside them where it is nowhere else."""
        if _internal_call or not is_adapted(self.model) or is_sharded(causal_lm(self.model)):
            super().save_model(output_dir, _internal_call)
        elif self.is_world_process_zero():
            folder, whole = Path(output_dir or str(self.args.output_dir)), bool(self.args.merge_adapters)  # type: ignore[attr-defined]
            how = save_adapted(copy.deepcopy(self.model) if whole else self.model, folder, whole=whole)
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
            say(f"the student is saved {how}, in {folder}")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`, but only the model is uploaded, from the output folder's `hub`."""
        with self._uploading_alone():
            return super().push_to_hub(*args, **kwargs)

    @contextlib.contextmanager
    def _uploading_alone(self) -> Iterator[None]:
        """Within it the output folder is its subfolder `hub`.

        transformers uploads the whole output folder, which holds the teacher's cache and the training prompts.
        """
        before, folder = self.args.output_dir, self.folder / "hub"
        folder.mkdir(parents=True, exist_ok=True)
        self.args.output_dir = str(folder)
        try:
            yield
        finally:
            self.args.output_dir = before

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        partial, target = self.folder / "checkpoint.partial", self.folder / f"checkpoint-{self.state.global_step}"
        self.before_saving()
        writes = self.is_world_process_zero()
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving_to = str(partial)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if writes:
                self.write_state(partial / target.name)
                _forget_best(partial / target.name / "trainer_state.json")
                seal(partial / target.name, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            if (trouble := disk_trouble(error)) is None:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"cannot write checkpoint {target}: {trouble}. Free some space and run the same command again; it goes"
                " on from the checkpoint before"
            ) from error
        finally:
            self._saving_to = None
            self.state.best_model_checkpoint = None  # transformers noted a place that is gone
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            if self.args.push_to_hub:
                with self._uploading_alone():
                    super()._push_from_checkpoint(str(target))
            self.remove_old()
        self.accelerator.wait_for_everyone()


def _forget_best(state: Path) -> None:
    """transformers notes the best checkpoint's place, which is gone once the checkpoint is renamed."""
    known = json.loads(state.read_text(encoding="utf-8"))
    write_json(state, known | {"best_model_checkpoint": None})
