"""What a data set holds: records, samples, what was left out of it, tokens and their lengths.

Knows samples and reports. Does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.plan.lengths import LengthHistogram, length_histogram, quantiles

NAMES = {  # what parts of a report are called; others by their own names
    "skipped": "left out: prompt over the limit",
    "truncated": "responses cut to the limit",
    "unused": "fields that no model is told",
    "unwritten": "not written by the template",
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
    records: int  # that became samples, those left out for their length included
    samples: int
    report: dict[str, Any]  # what was left out, cut or counted: a number, or a number by name
    tokens: int
    supervised_tokens: int
    prompts: dict[str, int]  # percent -> length
    responses: dict[str, int]
    histogram: LengthHistogram
    max_length: Cut
    max_prompt_length: Cut


def data_plan(name: str, known: SampleSet, report: LengthReport, max_length: int, max_prompt_length: int) -> DataPlan:
    """The numbers of a data set that was read with these limits."""
    encoded = known.encoded
    shorter, missing = _cuts(known, report, max_length, max_prompt_length)
    return DataPlan(
        name=name,
        records=len(known.samples),
        samples=len(encoded),
        report=report_parts(report),
        tokens=sum(map(len, encoded)),
        supervised_tokens=sum(one.supervised_count for one in encoded),
        prompts=quantiles([len(one.prompt_ids) for one in encoded]),
        responses=quantiles([len(one.response_ids) for one in encoded]),
        histogram=length_histogram(encoded),
        max_length=shorter,
        max_prompt_length=missing,
    )


def report_parts(report: LengthReport) -> dict[str, Any]:
    """Every part of a report but its number of samples, by its name: lines and pairs as their number."""
    parts = {
        f.name: _counted(getattr(report, f.name)) for f in fields(report) if f.name not in ("samples", "unit", "before")
    }
    return {name: count for name, count in parts.items() if count}


def _counted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _counted(one) for name, one in value.items()}
    if not isinstance(value, (tuple, list, set, frozenset)):
        return value
    if value and all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) for one in value):
        return {name: _counted(one) for name, one in value}
    return len(value)


def _cuts(known: SampleSet, report: LengthReport, max_length: int, max_prompt_length: int) -> tuple[Cut, Cut]:
    """What each limit took."""
    lengths = list(zip(report.before.prompts, report.before.samples, strict=True))
    gone = [length for asked, length in lengths if asked > max_prompt_length]
    shorter = [length for asked, length in lengths if asked <= max_prompt_length and length > max_length]
    lost = sum(length - max_length for length in shorter)
    kept = sum(map(len, known.encoded))
    rest = sum(length for _, length in lengths) - lost - kept
    return Cut(max_length, len(shorter), lost), Cut(max_prompt_length, len(gone), rest)
