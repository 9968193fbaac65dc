"""Whether a step's loss and gradient are finite. Does not know what becomes of a step that is not: the trainer acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.system import ranks
from pocl_fast.training.metrics import LossParts

MOST_NAMED = 5  # samples in a message


class FiniteSteps:
    """Looks at each step before the optimizer does. `samples` gives the lines of the samples for messages."""

    def __init__(self, samples: SampleSet) -> None:
        self._samples = samples
        self.grad_norm: Any = 0.0  # of the step in progress, before clipping

    def check(
        self,
        parts: LossParts,
        *,
        scaled: bool,
        on_all_ranks: Callable[[Tensor], Tensor] | None,
    ) -> str | None:
        """What of the step in progress is not finite, in words; None where all of it is.

        Where the gradients are `scaled` (fp16), only the loss is looked at: the scaler skips the overflows that it
        causes. `on_all_ranks` gathers a tensor [1] of every rank; each rank then must call and has the same answer.
        """
        finite = parts.finite()
        if not scaled:
            norm = self.grad_norm.full_tensor() if hasattr(self.grad_norm, "full_tensor") else self.grad_norm
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if on_all_ranks is not None:
            finite = on_all_ranks(finite.reshape(1)).all()
        if bool(finite):  # the step's one wait for the device
            return None
        bad = [self._name(sample) for sample in parts.nonfinite_samples()]
        named = [name for part in ranks.gather(bad) for name in part]
        if not named:
            return f"the gradient is not finite (norm {self.grad_norm})"
        more = ", ..." if len(named) > MOST_NAMED else ""
        return f"the loss of {', '.join(named[:MOST_NAMED])}{more} is not finite"

    def _name(self, sample: EncodedSample) -> str:
        return f"sample {sample.index} ({self._samples.samples[sample.index].place})"
