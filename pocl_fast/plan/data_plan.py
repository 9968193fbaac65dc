"""What a data set holds: records, samples, what was left out of it, tokens and their lengths.

Knows samples and reports. Does not know models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pocl_fast.data.answer_choice import Notes
from pocl_fast.data.length_report import LengthLimits, LengthReport
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.plan.lengths import LengthHistogram, length_histogram, quantiles

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
class Cut:
    """What a limit of the length costs."""

    limit: int  # tokens
    samples: int  # that are shorter, or not there, by it
    tokens: int  # that are not trained on by it


@dataclass(frozen=True)
class DataPlan:
    """A data set in numbers. Lengths are in tokens."""

    name: str
    records: int  # that were read, those left out included
    samples: int
    held_out: int  # samples that were taken out of it to evaluate with; not among `samples`
    report: dict[str, Any]  # what was left out, cut or counted of all records: a number, or a number by name
    tokens: int
    supervised_tokens: int
    prompts: dict[str, int]  # percent -> length
    responses: dict[str, int]
    histogram: LengthHistogram
    max_length: Cut  # of all records, as is
    max_prompt_length: Cut


def data_plan(name: str, known: SampleSet, report: LengthReport | None, limits: LengthLimits) -> DataPlan:
    """The numbers of a data set that was read with these limits; `known` has its samples but for those held out.
    `report` is None for the samples that were held out of another."""
    encoded = known.encoded
    report = LengthReport(len(encoded)) if report is None else report
    left_out = len(report.skipped) + len(report.untrained) + sum(len(lines) for _, lines in report.bad)
    shorter, missing = _cuts(report, limits)
    return DataPlan(
        name=name,
        records=report.samples + left_out,
        samples=len(encoded),
        held_out=report.samples - len(encoded),
        report=report_parts(report),
        tokens=sum(map(len, encoded)),
        supervised_tokens=sum(one.supervised_count for one in encoded),
        prompts=quantiles([one.spans[0][0] for one in encoded]),
        responses=quantiles([one.supervised_count for one in encoded]),
        histogram=length_histogram(encoded),
        max_length=shorter,
        max_prompt_length=missing,
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
        "notes": dict(_noted(report.notes)),
        "unused": dict(report.unused),
        "unwritten": {what: len(lines) for what, lines in report.unwritten},
        "control": len(report.control.lines),
    }
    return {name: count for name, count in parts.items() if count}


def _noted(notes: Notes) -> Iterator[tuple[str, int]]:
    """What was decided about answers, and of how many answers or records: out of the notes' own words, of which each
    part with a number is "what it is: {count}" or "what it is: {records}"."""
    for what, count, lines in notes:
        for part in what.split("; "):
            if found := re.match(r"(.+): \{(count|records)\}", part):
                yield found[1], count if found[2] == "count" else len(lines)


def _cuts(report: LengthReport, limits: LengthLimits) -> tuple[Cut, Cut]:
    """What each limit took: that of prompts from samples whose prompt is over it, that of samples from the others."""
    before = report.before
    over: list[int] = []
    longer: list[int] = []
    for asked, length, kept in zip(before.prompts, before.samples, before.kept, strict=True):
        if asked > limits.max_prompt_length:
            over.append(length - kept)
        elif asked and length > kept:  # 0 where nothing is trained on
            longer.append(length - kept)
    return (
        Cut(limits.max_length, len(longer), sum(longer)),
        Cut(limits.max_prompt_length, len(over), sum(over)),
    )
