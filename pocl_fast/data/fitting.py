"""A data set's samples made to fit the length limits, and a count of what these and the options took from it.

Does not know where samples come from, nor how one becomes tokens (encoding.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pocl_fast.data.encoded import EncodedSample, Fitted
from pocl_fast.data.encoding import BATCH, SampleEncoder
from pocl_fast.data.length_report import LengthReport, OverTheLimit, SampleLengths, check_limits, nothing_trained
from pocl_fast.data.long_prompts import Rule, Shortenings, shortened
from pocl_fast.records.bad_records import BadRecord, BadRecords
from pocl_fast.records.samples import Sample
from pocl_fast.system import garbage
from pocl_fast.system.console import watched
from pocl_fast.templates import unused_fields


class Fitting:
    """One pass over the samples of a data set."""

    def __init__(
        self,
        encoder: SampleEncoder,
        *,
        max_length: int,
        max_prompt_length: int,
        long_prompts: Rule,
        name: str,
        bad: BadRecords | None = None,
        batch: int = BATCH,
    ) -> None:
        """`name` stands for the data set in messages. Raises `InputError` for limits that leave a response no room."""
        check_limits(max_length, max_prompt_length)
        self._encoder, self._name, self._rule = encoder, name, long_prompts
        self._limits: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length, "name": name}
        self._bad, self._batch = bad or BadRecords(), batch
        self._fields = unused_fields.UnusedFields(encoder, name)
        self._count = self._kept = self._longest = self._turns = self._cut = 0
        self._skipped: list[int] = []
        self._untrained: list[int] = []
        self._truncated: list[int] = []
        self._shortened: list[int] = []
        self._before = SampleLengths()
        self._unit = "line"
        self._take_notes()

    def each(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, EncodedSample]]:
        """The samples that fit, as they are used, with their tokens, in order. Raises `BadRecord` for a sample that the
        template refuses, where it may not be left out."""
        return ((one.sample, one.encoded) for one in self.fitted(samples) if one.encoded is not None)

    def fitted(self, samples: Iterable[Sample]) -> Iterator[Fitted]:
        """The same, with those that are left out for their length, or because nothing in them is trained on."""
        fitted = self._encoder.fit_each(self._seen(samples), self._bad.found, **self._limits, batch=self._batch)
        with garbage.old_objects_set_aside():
            for sample, made in fitted:
                try:
                    one = self._made_to_fit(sample, made)
                except BadRecord as error:  # of what was left of it
                    self._encoder.forget(sample.line)
                    self._bad.found(error, sample.line)
                    continue
                self._before.add(made, one)
                if one.encoded is None:
                    if one.asked:
                        self._encoder.forget(sample.line)  # nothing of it is used
                    (self._skipped if one.asked else self._untrained).append(sample.line)
                    self._longest = max(self._longest, one.asked)
                else:
                    self._kept += 1
                    if one.encoded.truncated:
                        self._truncated.append(sample.line)
                yield one

    def report(self) -> LengthReport:
        """What was taken, after the last sample. Raises `InputError` where a prompt is over the limit and may not be,
        and where no sample is left."""
        taken = self.taken()
        if self._skipped and (self._rule != "skip" or not self._kept):
            over = OverTheLimit(tuple(self._skipped), self._count, self._longest, self._unit)
            raise over.error(self._name, self._limits["max_prompt_length"], self._rule)
        self._bad.check_left(self._kept + len(self._untrained), self._name, self._unit)
        if not self._kept and self._untrained:
            raise nothing_trained(self._name, self._untrained, self._unit)
        return taken

    def taken(self) -> LengthReport:
        """The same, whatever is left."""
        unwritten, notes, control = self._take_notes()
        return LengthReport(
            self._kept,
            tuple(self._skipped),
            tuple(self._truncated),
            self._fields.counts,
            unwritten,
            tuple(self._untrained),
            notes,
            self._bad.counts,
            control,
            Shortenings(tuple(self._shortened), self._turns, self._cut),
            self._unit,
            self._before,
        )

    def _seen(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples, their fields counted, but for those of which something is left out that changes the question."""
        for sample in samples:
            self._count, self._unit = self._count + 1, sample.unit
            try:
                self._fields.see(sample)
            except BadRecord as error:
                self._bad.found(error, sample.line)
                continue
            yield sample

    def _made_to_fit(self, sample: Sample, too_long: Fitted) -> Fitted:
        """The sample with a shortened prompt where that is asked for; as it is where it fits, and where none is short
        enough."""
        if too_long.encoded is not None or not too_long.asked or self._rule != "truncate-left":
            return too_long

        def length(one: Sample) -> int:
            try:
                return self._encoder.asked(one, self._name) or sys.maxsize
            except BadRecord:  # a template may refuse what is left of a conversation
                return sys.maxsize

        shorter = shortened(sample, length, self._limits["max_prompt_length"], answer=too_long.trained[0])
        if shorter is None:
            return too_long
        made = replace(self._encoder.fit(shorter.sample, **self._limits), lost=shorter.lost)
        if made.encoded is not None:
            self._shortened.append(sample.line)
            self._turns += shorter.turns
            self._cut += shorter.cut
        return made

    def _take_notes(self) -> Any:
        """What the encoder noted of samples since the last call."""
        encoder = self._encoder
        return encoder.take_unwritten(), encoder.choice.take_notes(), encoder.take_control()


def fit_all(
    samples: Sequence[Sample], encoder: SampleEncoder, **given: Any
) -> tuple[list[tuple[Sample, EncodedSample]], LengthReport]:
    """Every sample that fits, as it is used, with its tokens, in order, and a report of those that did not. What is
    `given`, and what is raised, is as of `Fitting`."""
    fitting = Fitting(encoder, **given)
    fitted = list(fitting.each(watched(samples, f"reading {given['name']}", "samples")))
    return fitted, fitting.report()


def encode_all(
    samples: Sequence[Sample], encoder: SampleEncoder, **given: Any
) -> tuple[list[EncodedSample], LengthReport]:
    """The tokens of `fit_all`."""
    fitted, report = fit_all(samples, encoder, **given)
    return [one for _, one in fitted], report
