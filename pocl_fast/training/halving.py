"""Micro-batches that do not fit into memory are computed in pieces, with the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.training.micro_batches import MicroBatch

ADVICE = "give a smaller per_device_train_batch_size (with more gradient_accumulation_steps) or max_length"


class Halving:
    """Runs micro-batches in pieces that fit into memory: where a piece does not, in twice as many from there on."""

    def __init__(self) -> None:
        self.count = 1  # pieces of a micro-batch
        self.repeating = False  # computing the step's earlier micro-batches again, whose gradient was lost

    def run(
        self,
        compute: Callable[[MicroBatch], Tensor],  # forward and backward; the loss, which adds up over pieces
        batch: MicroBatch,
        earlier: Sequence[MicroBatch],  # micro-batches of the same step
        clear: Callable[[], None],  # the step's gradient, and what was noted of `batch`
        *,
        ranks: int = 1,
    ) -> Tensor:
        """The loss of a micro-batch.

        Raises `InputError` where a single sample does not fit, and wherever memory runs out with several ranks: they
        must agree on how often they exchange gradients.
        """
        while True:
            try:
                return self._in_pieces(compute, batch)
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):  # type: ignore[arg-type]
                    raise
                self._halve(batch, error, ranks)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            clear()  # what failed may have left a part of its gradient
            self.repeating = True
            try:
                for one in earlier:
                    self._in_pieces(compute, one)
            finally:
                self.repeating = False

    def _in_pieces(self, compute: Callable[[MicroBatch], Tensor], batch: MicroBatch) -> Tensor:
        return torch.stack([compute(piece) for piece in batch.pieces(self.count)]).sum()

    def _halve(self, batch: MicroBatch, error: BaseException, ranks: int) -> None:
        samples = batch.samples
        if ranks > 1:
            raise InputError(f"out of memory with {len(samples)} samples on one rank: {ADVICE}") from error
        if self.count >= len(samples):
            longest = max(samples, key=len)
            raise InputError(
                f"out of memory with sample {longest.index} alone, of {len(longest)} tokens: {ADVICE}"
            ) from error
        self.count = min(2 * self.count, len(samples))
        say(
            f"out of memory with {len(samples)} samples: from here on a batch is computed in {self.count} pieces, with"
            " the same gradient"
        )
