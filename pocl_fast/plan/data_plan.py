"""What a data set holds: records, samples, what was left out of it, tokens and their lengths.

Knows samples and reports. Does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pocl_fast.data.control_text import KeptAsText
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.long_prompts import Shortenings
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.plan.lengths import LengthHistogram, length_histogram, quantiles

NAMES = {  # what parts of a report are called; others by their own names
    "held_out": "held out, not trained on",
    "skipped": "left out: prompt over the limit",
    "truncated": "responses cut to the limit",
    "unused": "records with a field that is not used",
    "control": "control tokens kept as text: samples",
    "shortened": "prompts shortened to the limit",
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


def data_plan(
    name: str,
    known: SampleSet,
    report: LengthReport,
    max_length: int,
    max_prompt_length: int,
    held_out: SampleSet | None = None,
) -> DataPlan:
    """The numbers of a data set that was read with these limits. The report counts those `held_out` of it too."""
    encoded = known.encoded
    out = [] if held_out is None else held_out.encoded
    shorter, missing = _cuts(sum(map(len, [*encoded, *out])), report, max_length, max_prompt_length)
    return DataPlan(
        name=name,
        records=len(known.samples),
        samples=len(encoded),
        report=({"held_out": len(out)} if out else {}) | report_parts(report),
        tokens=sum(map(len, encoded)),
        supervised_tokens=sum(one.supervised_count for one in encoded),
        prompts=quantiles([len(one.prompt_ids) for one in encoded]),
        responses=quantiles([len(one.response_ids) for one in encoded]),
        histogram=length_histogram(encoded),
        max_length=shorter,
        max_prompt_length=missing,
    )


def held_out_plan(name: str, known: SampleSet, max_length: int, max_prompt_length: int) -> DataPlan:
    """The numbers of samples that are held out of a file whose report is another's."""
    return replace(
        data_plan(name, known, LengthReport(len(known.encoded)), max_length, max_prompt_length),
        records=len(known.encoded),
        max_length=Cut(max_length, 0, 0),
        max_prompt_length=Cut(max_prompt_length, 0, 0),
    )


def report_parts(report: LengthReport) -> dict[str, Any]:
    """Every part of a report but its number of samples, by its name: lines and pairs as their number."""
    parts = {
        f.name: _counted(getattr(report, f.name)) for f in fields(report) if f.name not in ("samples", "unit", "before")
    }
    return {name: count for name, count in parts.items() if count}


def _counted(value: Any) -> Any:
    if isinstance(value, (KeptAsText, Shortenings)):
        return len(value.lines)
    if isinstance(value, Mapping):
        return {str(name): _counted(one) for name, one in value.items()}
    if not isinstance(value, (tuple, list, set, frozenset)):
        return value
    if value and all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) for one in value):
        return {name: _counted(one) for name, one in value}
    return len(value)


def _cuts(kept: int, report: LengthReport, max_length: int, max_prompt_length: int) -> tuple[Cut, Cut]:
    """What each limit took, where it left `kept` tokens."""
    lengths = list(zip(report.before.prompts, report.before.samples, strict=True))
    gone = [length for asked, length in lengths if asked > max_prompt_length]
    shorter = [length for asked, length in lengths if asked <= max_prompt_length and length > max_length]
    lost = sum(length - max_length for length in shorter)
    rest = sum(length for _, length in lengths) - lost - kept
    return Cut(max_length, len(shorter), lost), Cut(max_prompt_length, len(gone), rest)
