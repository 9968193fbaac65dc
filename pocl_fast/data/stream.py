"""The samples of a file that does not fit in memory: read and tokenised a piece at a time, anew in each pass.

The samples and tokens are those that `encoding.encode_all` gives of the whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pocl_fast.data.encoding import EncodedSample, LengthReport, SampleEncoder, check_limits, over_the_limit
from pocl_fast.data.sample_set import SetOptions
from pocl_fast.data.unused_fields import UnusedFields
from pocl_fast.records.bad_records import BadRecord, BadRecords
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
        fields, bad = self._fields(), BadRecords(self.options.bad_records)
        for sample, one in self._encoded(bad, fields):
            count += 1
            if one is None:
                skipped.append(sample.line)
                longest = max(longest, len(self.encoder.encode_prompt(sample)))
            elif one.truncated:
                truncated.append(sample.line)
        left_out = self.encoder.take_unwritten()
        if skipped and (self.options.long_prompts == "error" or len(skipped) == count):
            raise over_the_limit(self.source.name, skipped, count, longest, self.options.max_prompt_length)
        bad.check_left(count - len(skipped), self.source.name)
        return LengthReport(count - len(skipped), tuple(skipped), tuple(truncated), fields.counts, left_out, bad.counts)

    def __iter__(self) -> Iterator[list[tuple[Sample, EncodedSample]]]:
        piece: list[tuple[Sample, EncodedSample]] = []
        for sample, one in self._encoded(BadRecords(self.options.bad_records), self._fields()):
            if one is not None:
                piece.append((sample, one))
            if len(piece) == resumable_table.PIECE:
                yield piece
                piece = []
        if piece:
            yield piece

    def _fields(self) -> UnusedFields:
        return UnusedFields(self.encoder, self.source.name)

    def _encoded(self, bad: BadRecords, fields: UnusedFields) -> Iterator[tuple[Sample, EncodedSample | None]]:
        """Each sample and its tokens. `bad` and `fields` are of this pass alone."""
        limits = {"max_length": self.options.max_length, "max_prompt_length": self.options.max_prompt_length}
        for sample in iter_samples(self.source, fields=self.options.fields, bad=bad):
            try:
                fields.see(sample)  # which refuses some, in each pass alike
                one = self.encoder.encode(sample, **limits, name=self.source.name)
            except BadRecord as error:
                bad.found(error, sample.line)
                continue
            yield sample, one
