"""The samples of a file that does not fit in memory: read and tokenised a piece at a time, anew in each pass.

The samples and tokens are those that `encoding.encode_all` gives of the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pocl_fast.data.encoding import EncodedSample, LengthReport, SampleEncoder, check_limits, over_the_limit
from pocl_fast.data.records import Sample, iter_samples
from pocl_fast.data.unused_fields import UnusedFields
from pocl_fast.system import resumable_table


@dataclass(frozen=True)
class SampleStream:
    """Iterating gives lists of the samples within the length limits, with their tokens, in file order."""

    path: Path
    encoder: SampleEncoder
    max_length: int
    max_prompt_length: int
    long_prompts: Literal["error", "skip"]

    def check(self) -> LengthReport:
        """Reads the whole file, keeping nothing. Raises `InputError` where `read_samples` or `encode_all` would."""
        check_limits(self.max_length, self.max_prompt_length)
        skipped: list[int] = []
        truncated: list[int] = []
        count = longest = 0
        self.encoder.take_unwritten()
        fields = UnusedFields(self.encoder, str(self.path))
        for sample, one in self._encoded(fields.see):
            count += 1
            if one is None:
                skipped.append(sample.line)
                longest = max(longest, len(self.encoder.encode_prompt(sample)))
            elif one.truncated:
                truncated.append(sample.line)
        left_out = self.encoder.take_unwritten()
        if skipped and (self.long_prompts == "error" or len(skipped) == count):
            raise over_the_limit(str(self.path), skipped, count, longest, self.max_prompt_length)
        return LengthReport(count - len(skipped), tuple(skipped), tuple(truncated), fields.counts, left_out)

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
        for sample in iter_samples(self.path):
            see(sample)
            limits = {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}
            yield sample, self.encoder.encode(sample, **limits, name=str(self.path))
