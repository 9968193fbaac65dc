"""Steps whose loss or gradient is not finite, and what becomes of them: they never reach the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pocl_fast.data.encoding import EncodedSample
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError

if TYPE_CHECKING:
    from pocl_fast.training.trainer import PoclTrainer


class FiniteSteps:
    """Looks at each step of a `PoclTrainer` before the optimizer does."""

    def __init__(self, trainer: PoclTrainer) -> None:
        self.trainer = trainer
        self.grad_norm: Any = 0.0  # of the step in progress, before clipping
        self._loss_before = torch.zeros(())  # summed up since the last log, without the step in progress

    def begin_step(self) -> None:
        self._loss_before = self.trainer._tr_loss.clone()

    def check(self) -> None:
        """Where the loss or the gradient is not finite the weights stay as they are: the step is skipped, or
        `InputError` raised, as `on_nonfinite` says."""
        trainer, args = self.trainer, self.trainer.args
        scaled = getattr(trainer.accelerator, "scaler", None) is not None  # which skips overflows of its own making
        finite = trainer.loss_parts.finite()
        if not scaled:
            norm = self.grad_norm.full_tensor() if hasattr(self.grad_norm, "full_tensor") else self.grad_norm
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if args.world_size > 1:  # one answer, for what follows is for all
            finite = trainer.accelerator.gather(finite.reshape(1).to(args.device)).all()
        if bool(finite):  # the step's one wait for the device
            return
        bad = trainer.loss_parts.nonfinite_samples()
        named = [name for part in ranks.gather([self._name(sample) for sample in bad]) for name in part]
        of = f" of {', '.join(named[:5])}{', ...' if len(named) > 5 else ''}" if named else ""
        what = f"the loss{of} is not finite" if named else f"the gradient is not finite (norm {self.grad_norm})"
        where = f"at stage {trainer.progress.stage + 1}, step {trainer.state.global_step + 1}"
        if args.on_nonfinite == "stop":
            raise InputError(
                f"{what} {where}: look for damaged weights in the models, give a lower learning rate (now"
                f" {args.learning_rate}), or on_nonfinite=skip to leave such steps out"
            )
        trainer.progress.skipped_steps += 1
        trainer.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]  # nothing to step on
        trainer.loss_parts.forget_step()
        trainer._tr_loss = self._loss_before
        if trainer.is_world_process_zero():
            say(f"{what} {where}: the step is skipped ({trainer.progress.skipped_steps} so far)")

    def _name(self, sample: EncodedSample) -> str:
        return f"sample {sample.index} (line {self.trainer.samples.samples[sample.index].line})"
