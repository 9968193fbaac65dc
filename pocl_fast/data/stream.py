"""The samples of a file that does not fit in memory: read and tokenised a piece at a time, anew in each pass.

The samples and tokens are those that `encoding.encode_all` gives of the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pocl_fast.data.encoding import EncodedSample, LengthReport, SampleEncoder, check_limits, over_the_limit
from pocl_fast.data.sample_set import SetOptions
from pocl_fast.data.unused_fields import UnusedFields
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

    def check(self) -> LengthReport:
        """Reads the whole file, keeping nothing. Raises `InputError` where `read_samples` or `encode_all` would."""
        check_limits(self.options.max_length, self.options.max_prompt_length)
        skipped: list[int] = []
        truncated: list[int] = []
        count = longest = 0
        self.encoder.take_unwritten()
        fields = UnusedFields(self.encoder, self.source.name)
        for sample, one in self._encoded(fields.see):
            count += 1
            if one is None:
                skipped.append(sample.line)
                longest = max(longest, len(self.encoder.encode_prompt(sample)))
            elif one.truncated:
                truncated.append(sample.line)
        left_out = self.encoder.take_unwritten()
        if skipped and (self.options.long_prompts == "error" or len(skipped) == count):
            raise over_the_limit(
                self.source.name, skipped, self.source.unit, count, longest, self.options.max_prompt_length
            )
        unit = self.source.unit
        return LengthReport(count - len(skipped), tuple(skipped), tuple(truncated), fields.counts, left_out, unit)

    def __iter__(self) -> Iterator[list[tuple[Sample, EncodedSample]]]:
        piece: list[tuple[Sample, EncodedSample]] = []
        for sample, one in self._encoded():
            if one is not None:
                piece.append((sample, one))
            if len(piece) == resumable_table.PIECE:
                yield piece
                piece = []
        if piece:
            yield piece

    def _encoded(
        self, see: Callable[[Sample], object] = lambda _: None
    ) -> Iterator[tuple[Sample, EncodedSample | None]]:
        for sample in iter_samples(self.source, fields=self.options.fields, bad=BadRecords(self.options.bad_records)):
            see(sample)
            limits = {"max_length": self.options.max_length, "max_prompt_length": self.options.max_prompt_length}
            yield sample, self.encoder.encode(sample, **limits, name=self.source.name)
