"""What training measures: the sums between two logs, and metrics.jsonl, a line for each log and each evaluation.

Knows losses and files. Does not know when either is asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import PackedBatch
from pocl_fast.loss.output import STATS, LossOutput
from pocl_fast.system.files import read_json_lines, write_text

OF_TEACHER = ("divergence", "teacher_entropy", "agreement")  # of STATS: they mean nothing where there is no teacher


class MetricsLog:
    """Writes metrics.jsonl; each record has the number of optimizer steps done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Removes the records after this step: these steps are about to be done again."""
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_text(self.path, [json.dumps(line) + "\n" for line in kept])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut off by a crash is left out."""
    return read_json_lines(path)


class LossParts:
    """What the loss kernel measures besides the loss, summed over the steps between two logs.

    The sums stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        self._reset()
        self.begin_step()

    def _reset(self) -> None:
        self._sums: Tensor | None = None  # [7] fp64: of STATS over tokens, and the tokens
        self._tokens = 0
        self._since = time.perf_counter()

    def begin_step(self) -> None:
        self._step: list[tuple[Sequence[EncodedSample], PackedBatch, LossOutput]] = []

    def add(self, samples: Sequence[EncodedSample], batch: PackedBatch, out: LossOutput) -> None:
        """A micro-batch of the step in progress."""
        out = replace(out, loss=out.loss.detach())  # the graph behind it holds gradients
        self._step.append((samples, batch, out))

    def drop(self, samples: Sequence[EncodedSample]) -> None:
        """Forgets what was added of these samples: they are computed again."""
        again = {id(sample) for sample in samples}
        self._step = [one for one in self._step if not one[0] or id(one[0][0]) not in again]

    def forget_step(self) -> None:
        self._step = []

    def end_step(self) -> None:
        """Adds the step in progress to the sums."""
        for samples, batch, out in self._step:
            self._tokens += sum(batch.lengths) if samples else 0
            sums = torch.cat([out.stats[1:].sum(1, dtype=torch.float64), out.num_tokens.reshape(1)])
            self._sums = sums if self._sums is None else self._sums + sums
        self._step = []

    def finite(self) -> Tensor:
        """Whether every loss of the step in progress is finite, 0-d, on the losses' device."""
        losses = [torch.isfinite(out.loss) for _, _, out in self._step]
        return torch.stack(losses).all() if losses else torch.ones((), dtype=torch.bool)

    def nonfinite_samples(self) -> list[EncodedSample]:
        """The samples of the step in progress that have a token whose loss is not finite."""
        return [
            sample
            for samples, batch, out in self._step
            if samples
            for sample, finite in zip(samples, _finite(out).split(batch.counts), strict=True)
            if not bool(finite.all())
        ]

    def pause(self, seconds: float) -> None:
        """Leaves these seconds out of the speed."""
        self._since += seconds

    def means(self, reduce: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """Means over the supervised tokens since the last call, and the speed; `reduce` sums over the ranks."""
        if self._sums is None:
            return {}
        values = torch.cat([self._sums, self._sums.new_tensor([self._tokens])])
        *totals, supervised, tokens = (values if reduce is None else reduce(values)).tolist()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._reset()
        return {
            **{name: total / max(supervised, 1) for name, total in zip(STATS, totals, strict=True)},
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
        }


def _finite(out: LossOutput) -> Tensor:
    """Whether a token's cross-entropy and divergence are finite, [N]."""
    return torch.isfinite(out.per_token["ce"]) & torch.isfinite(out.per_token["divergence"])
