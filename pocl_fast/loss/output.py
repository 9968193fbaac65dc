"""`LossOutput`: a loss, and the means and values a token that its kernel has computed in the same pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pocl_fast.loss.reference import Rows

# what a kernel knows of a token beside its loss: the rows of `LossOutput.stats` after the first
STATS = Rows._fields[1:]


@dataclass(frozen=True)
class LossOutput:
    """A loss and what the same pass knows besides: tensors on the logits' device, all but `loss` detached.

    Means are computed where they are asked for, so that a step which logs nothing does not pay for them."""

    loss: Tensor  # 0-d, or [N] with reduction "none"
    num_tokens: Tensor  # 0-d: supervised tokens
    stats: Tensor = field(repr=False)  # [7, N] of each token: see `reference.Rows`

    @property
    def ce(self) -> Tensor:
        """0-d: mean cross-entropy over supervised tokens, nats."""
        return self._mean(self.stats[1])

    @property
    def divergence(self) -> Tensor:
        """0-d: mean divergence over supervised tokens, without its temperature factor, nats."""
        return self._mean(self.stats[2])

    @property
    def metrics(self) -> dict[str, Tensor]:
        """student_entropy, teacher_entropy (nats), accuracy, agreement: 0-d means over supervised tokens."""
        return dict(zip(STATS[2:], self._mean(self.stats[3:]).unbind(), strict=True))

    @property
    def per_token(self) -> dict[str, Tensor]:
        """[N] each: ce, divergence, student_entropy, teacher_entropy, accuracy, agreement; 0 for ignored tokens."""
        return dict(zip(STATS, self.stats[1:].unbind(), strict=True))

    def _mean(self, rows: Tensor) -> Tensor:
        return rows.sum(-1) / self.num_tokens.clamp_min(1)
