"""The samples of a file that does not fit in memory: read and tokenised a piece at a time, anew in each pass.

The samples and tokens are those that `encoding.encode_all` gives of the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pocl_fast.data.encoding import EncodedSample, Fitted, SampleEncoder
from pocl_fast.data.length_report import LengthReport, check_limits, nothing_trained, over_the_limit
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
        untrained: list[int] = []
        count = longest = 0
        self.encoder.take_unwritten()
        self.encoder.choice.take_notes()
        fields = UnusedFields(self.encoder, self.source.name)
        for line, one in self._fitted(fields.see):
            count += 1
            if one.encoded is None:
                (skipped if one.asked else untrained).append(line)
                longest = max(longest, one.asked)
            elif one.encoded.truncated:
                truncated.append(line)
        kept = count - len(skipped) - len(untrained)
        if skipped and (self.options.long_prompts == "error" or not kept):
            raise over_the_limit(self.source.name, skipped, count, longest, self.options.max_prompt_length)
        if not kept:
            raise nothing_trained(self.source.name, untrained)
        notes = fields.counts, self.encoder.take_unwritten(), tuple(untrained), self.encoder.choice.take_notes()
        return LengthReport(kept, tuple(skipped), tuple(truncated), *notes)

    def __iter__(self) -> Iterator[list[tuple[Sample, EncodedSample]]]:
        piece: list[tuple[Sample, EncodedSample]] = []
        for _, one in self._fitted():
            if one.encoded is not None:
                piece.append((one.sample, one.encoded))
            if len(piece) == resumable_table.PIECE:
                yield piece
                piece = []
        if piece:
            yield piece

    def _fitted(self, see: Callable[[Sample], object] = lambda _: None) -> Iterator[tuple[int, Fitted]]:
        """Each sample's line, and what became of it."""
        limits = {"max_length": self.options.max_length, "max_prompt_length": self.options.max_prompt_length}
        for sample in iter_samples(self.source, fields=self.options.fields, bad=BadRecords(self.options.bad_records)):
            see(sample)
            yield sample.line, self.encoder.fit(sample, **limits, name=self.source.name)
