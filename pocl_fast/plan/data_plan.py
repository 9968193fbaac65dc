"""What a data set holds: records, samples, what was left out of it, tokens and their lengths.

Knows samples and reports. Does not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocl_fast.data.length_report import LengthLimits, LengthReport
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.inspection.lengths import Lengths, count_lengths, quantiles

NAMES = {  # what the parts of a report are called
    "bad": "left out, bad record",
    "skipped": "left out: prompt over the limit",
    "untrained": "left out: no reasoning to train on",
    "shortened": "prompts shortened to the limit",
    "turns_dropped": "turns dropped of these",
    "questions_cut": "questions that lost their beginning",
    "truncated": "responses cut to the limit",
    "notes": "",  # each says what it is
    "unused": "with a field no model is told",
    "unwritten": "not written by the template",
    "control": "samples with control tokens kept as text",
}


@dataclass(frozen=True)
class DataPlan:
    """A data set in numbers. All but the lengths is of what is left within the limits."""

    name: str
    records: int  # that were read, those left out included
    samples: int
    held_out: int  # samples that were taken out of it to evaluate with; not among `samples`
    report: dict[str, Any]  # what was left out, cut or counted of all records: a number, or a number by name
    tokens: int
    supervised_tokens: int
    answers: dict[str, int]  # percent -> supervised tokens of a sample
    lengths: Lengths | None  # of all records; None of samples that are held out of others, with which they are counted


def data_plan(name: str, known: SampleSet, report: LengthReport | None, limits: LengthLimits) -> DataPlan:
    """The numbers of a data set that was read with these limits; `known` has its samples but for those held out.
    `report` is None for the samples that were held out of another."""
    encoded = known.encoded
    lengths = None if report is None else count_lengths(report.before, limits)
    report = LengthReport(len(encoded)) if report is None else report
    left_out = len(report.skipped) + len(report.untrained) + sum(len(lines) for _, lines in report.bad)
    return DataPlan(
        name=name,
        records=report.samples + left_out,
        samples=len(encoded),
        held_out=report.samples - len(encoded),
        report=report_parts(report),
        tokens=sum(map(len, encoded)),
        supervised_tokens=sum(one.supervised_count for one in encoded),
        answers=quantiles([one.supervised_count for one in encoded]),
        lengths=lengths,
    )


def report_parts(report: LengthReport) -> dict[str, Any]:
    """What a report counts, by the keys of `NAMES`: a number, or a number by name. Parts of nothing are left out."""
    parts: dict[str, Any] = {
        "bad": {kind: len(lines) for kind, lines in report.bad},
        "skipped": len(report.skipped),
        "untrained": len(report.untrained),
        "shortened": len(report.shortened.lines),
        "turns_dropped": report.shortened.turns,
        "questions_cut": report.shortened.cut,
        "truncated": len(report.truncated),
        "notes": {what: count for note in report.notes for what, count in note.counts.items()},
        "unused": dict(report.unused),
        "unwritten": {what: len(lines) for what, lines in report.unwritten},
        "control": len(report.control.lines),
    }
    return {name: count for name, count in parts.items() if count}
