"""Micro-batches that do not fit into memory are computed in pieces, with the same gradient; and what a CPU's allocator
keeps of freed memory is given back."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Sequence

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError
from pocl_fast.training.micro_batches import MicroBatch

GROWTH = 512 << 20  # bytes of resident memory between two returns
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


def memory_in_use(device: torch.device) -> int:
    """Bytes: the process's on a CPU, the tensors' peak on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class FreedMemory:
    """Returns to the system what the C library's allocator keeps of freed memory, whenever the process has grown much.

    Every new number of tokens makes oneDNN keep small things between the large blocks of a step, which then cannot be
    joined: 0.1 GB a step otherwise. 50 ms, each time.
    """

    def __init__(self) -> None:
        name = ctypes.util.find_library("c")
        self._trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None  # glibc's alone
        self._process = psutil.Process()
        self._floor = self._process.memory_info().rss

    def return_if_grown(self) -> None:
        """To be called between steps."""
        if self._trim is not None and self._process.memory_info().rss > self._floor + GROWTH:
            self._trim(0)
            self._floor = self._process.memory_info().rss
