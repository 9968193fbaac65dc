"""The student's own answers in a trainer's batches: what generates them, and what the loss then is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pocl_fast.answers.answerer import Answerer, AnswerLimits
from pocl_fast.models.unsharded import unsharded
from pocl_fast.training.micro_batches import MicroBatch, with_samples
from pocl_fast.training.rollouts import Policy, Rollouts

if TYPE_CHECKING:
    from pocl_fast.training.trainer import PoclTrainer


class OnPolicy:
    """`Rollouts` for a trainer. Where a batch is the student's, its loss is the divergence alone, as in GKD and
    DistiLLM: a student's cross-entropy on its own samples teaches nothing."""

    def __init__(self, trainer: PoclTrainer) -> None:
        args = trainer.args
        self._trainer = trainer
        self.rollouts = Rollouts(
            policy_of(args),
            self._generate,
            AnswerLimits(args.max_new_tokens, args.max_length, trainer.encoder.end_id),
            total_steps=trainer.planned().planned_total,
            seed=args.seed,
        )
        self._counted = (0.0, time.perf_counter())  # seconds generated, and when

    @property
    def wants_first_loss(self) -> bool:
        """Whether the dev loss before training is asked for."""
        return self.rollouts.policy.rollouts == "adaptive"

    def batches(self, batches: Sequence[MicroBatch], step: int) -> list[MicroBatch]:
        """A step's micro-batches as they are trained on; every rank must call."""
        everything = [sample for batch in batches for sample in batch["samples"]]
        made = self.rollouts.batch(everything, step)
        if made.source == "data":
            return list(batches)
        given = iter(made.samples)
        return [with_samples(batch, [next(given) for _ in batch["samples"]], live=True) for batch in batches]

    def logs(self) -> dict[str, float]:
        """What happened since the last call, for the log."""
        before, since = self._counted
        self._counted = (self.rollouts.seconds, time.perf_counter())
        share = (self.rollouts.seconds - before) / max(self._counted[1] - since, 1e-9)
        logs = {"generation_share": share, "generated": float(self.rollouts.generated)}
        if self.rollouts.policy.rollouts == "adaptive":
            logs["rollout_threshold"] = self.rollouts.threshold
        return logs

    def _generate(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], seed: int
    ) -> Sequence[Sequence[int]]:
        trainer = self._trainer
        with unsharded(trainer.model) as model, trainer.accelerator.autocast():
            return Answerer.of(model, trainer.encoder, trainer.args, temperature=1.0)(prompts, sample_ids, seed)


def policy_of(options: Any) -> Policy:
    """The policy in options of these names."""
    names = ("rollouts", "lmbda", "mixed_alpha", "loss_eps", "replay_ratio", "replay_capacity")
    return Policy(**{name: getattr(options, name) for name in names})
