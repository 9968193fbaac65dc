"""The samples of a file that does not fit in memory: read and tokenised a piece at a time, anew in each pass.

The samples and tokens are those that `fitting.fit_all` gives of the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import BATCH, SampleEncoder
from pocl_fast.data.fitting import Fitting
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.sample_set import SetOptions
from pocl_fast.records.bad_records import BadRecords
from pocl_fast.records.samples import Sample, iter_samples
from pocl_fast.records.sources import Source
from pocl_fast.system import resumable_table


@dataclass(frozen=True)
class SampleStream:
    """Iterating gives lists of the samples within the length limits, with their tokens, in file order."""

    source: Source
    encoder: SampleEncoder
    options: SetOptions

    def check(self, seen: Callable[[Sample], object] = lambda _: None) -> LengthReport:
        """Reads the whole file, keeping nothing; `seen` is called with each sample that fits. Raises `InputError` where
        `read_samples` or `fit_all` would."""
        fitting, each = self._pass()
        for sample, _ in each:
            seen(sample)
        return fitting.report()

    def __iter__(self) -> Iterator[list[tuple[Sample, EncodedSample]]]:
        piece: list[tuple[Sample, EncodedSample]] = []
        for row in self._pass()[1]:
            piece.append(row)
            if len(piece) == resumable_table.PIECE:
                yield piece
                piece = []
        if piece:
            yield piece

    def _pass(self) -> tuple[Fitting, Iterator[tuple[Sample, EncodedSample]]]:
        """One reading of the file: what is counted, and the samples that fit."""
        bad, chosen = BadRecords(self.options.bad_records), self.options
        fitting = Fitting(
            self.encoder,
            max_length=chosen.max_length,
            max_prompt_length=chosen.max_prompt_length,
            long_prompts=chosen.long_prompts,
            name=self.source.name,
            bad=bad,
            batch=min(BATCH, resumable_table.PIECE),
        )
        return fitting, fitting.each(iter_samples(self.source, fields=chosen.fields, bad=bad))
