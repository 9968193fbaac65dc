"""How long the samples of a data set are, in tokens, and what the limits cut: counted once, drawn as SVG.

Does not know how samples become tokens, nor where the counts are kept.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from pocl_fast.data.length_report import LengthLimits, SampleLengths

BINS = 30
_DONE = {"skip": "left out", "truncate-left": "shortened"}  # which is done about long prompts
_BEYOND = 15  # bins over a limit; the last one holds all that is longer


@dataclass(frozen=True)
class Histogram:
    """How many of a kind have which length. Bin i holds lengths over edges[i], up to edges[i + 1]; the last one all
    that are longer, too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    median: int
    longest: int
    limit: int
    over: int  # how many are over the limit

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Lengths:
    """The lengths of a data set's prompts (what is before the first answer that is trained on) and of its samples
    (prompt and answers), before the limits."""

    prompts: Histogram
    samples: Histogram
    tokens: int  # of all samples whose prompt is within the limit
    cut_tokens: int  # of these, behind --max-length
    long_prompts: str  # what is done about prompts over the limit

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Lengths:
        prompts, samples = (_from_json(known[name]) for name in ("prompts", "samples"))
        return cls(prompts, samples, known["tokens"], known["cut_tokens"], known["long_prompts"])


def _from_json(known: dict[str, Any]) -> Histogram:
    return Histogram(**known | {name: tuple(known[name]) for name in ("edges", "counts")})


def count_lengths(before: SampleLengths, limits: LengthLimits) -> Lengths:
    """The lengths of a data set that was read within limits, as they were before these; of samples that something is
    trained on in."""
    prompts, samples = (np.array(one, dtype=np.int64) for one in (before.prompts, before.samples))
    prompts, samples = prompts[prompts > 0], samples[prompts > 0]
    kept = samples[prompts <= limits.max_prompt_length]
    return Lengths(
        histogram(prompts, limits.max_prompt_length),
        histogram(samples, limits.max_length),
        int(kept.sum()),
        int(np.maximum(kept - limits.max_length, 0).sum()),
        limits.long_prompts,
    )


def histogram(lengths: np.ndarray, limit: int) -> Histogram:
    """Lengths [samples] in bins of one width of which one ends at the limit, where any are over it."""
    values = np.sort(lengths)
    longest = int(values[-1])
    if longest <= limit:
        step = float(max(1, math.ceil(longest / BINS)))
        bins = max(1, math.ceil(longest / step))
    else:
        below = min(BINS - _BEYOND, limit)
        step = limit / below
        bins = below + min(_BEYOND, math.ceil((longest - limit) / step))
    edges = step * np.arange(bins + 1)
    places = np.clip(np.ceil(values / step - 1e-9).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    median = int(values[(len(values) - 1) // 2])
    over = int((values > limit).sum())
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)), median, longest, limit, over)


# -- in words and as a picture -----------------------------------------------------------------------------------------


def in_words(lengths: Lengths) -> list[str]:
    """What the limits cut, with counts."""
    prompts, samples = lengths.prompts, lengths.samples
    done = ""
    if prompts.over and lengths.long_prompts in _DONE:
        done = f": {_DONE[lengths.long_prompts]} (--long-prompts {lengths.long_prompts})"
    share = 100 * lengths.cut_tokens / max(1, lengths.tokens)
    lines = [
        f"prompts: median {prompts.median:,} tokens, longest {prompts.longest:,};"
        f" {prompts.over:,} of {prompts.total:,} are over --max-prompt-length {prompts.limit:,}{done}",
        f"prompts with answers: median {samples.median:,} tokens, longest {samples.longest:,};"
        f" {samples.over:,} of {samples.total:,} are over --max-length {samples.limit:,}",
    ]
    if lengths.cut_tokens:
        of = "of the samples whose prompt is within the limit, " if prompts.over else ""
        lines.append(f"{of}{lengths.cut_tokens:,} of {lengths.tokens:,} tokens ({share:.1f} %) are behind --max-length")
    return lines


def svg(one: Histogram, title: str, option: str) -> Markup:
    """A histogram with its limit; bars over the limit have the class "over". Drawn in the page's own colours."""
    wide, high, left, bottom, top = 480, 230, 46, 36, 40
    last = one.edges[-1]
    most = max(1, *one.counts)

    def x(length: float) -> float:
        return left + (wide - left - 12) * length / last

    def y(count: float) -> float:
        return high - bottom - (high - bottom - top) * count / most

    parts = [f'<svg class="lengths" viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{left}" y="14" class="title">{escape(title)}</text>')
    for count in dict.fromkeys((0, most // 2, most)):
        parts.append(f'<path d="M{left} {y(count):.1f}H{wide - 12}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y(count) + 4:.1f}" text-anchor="end">{count:,}</text>')
    for start, end, count in zip(one.edges, one.edges[1:], one.counts, strict=False):
        if count:
            over = " over" if start >= one.limit - 1e-6 else ""
            longer = f"to {one.longest:,}" if end == last and one.longest > last else f"to {math.floor(end + 1e-6):,}"
            said = f"{math.floor(start + 1e-6) + 1:,} {longer} tokens: {count:,}"
            parts.append(
                f'<rect class="bar{over}" x="{x(start):.1f}" y="{y(count):.1f}" width="{x(end) - x(start) - 0.6:.1f}"'
                f' height="{y(0) - y(count):.1f}"><title>{said}</title></rect>'
            )
    for length in _ticks(last):
        parts.append(f'<text x="{x(length):.1f}" y="{high - 20}" text-anchor="middle">{length:,}</text>')
    more = ", the last bar: all that are longer" if one.longest > last else ""
    parts.append(f'<text x="{left}" y="{high - 4}">tokens{more}</text>')
    if one.limit <= last:
        anchor = ' text-anchor="end"' if one.limit > last / 2 else ""
        parts.append(f'<path d="M{x(one.limit):.1f} {top - 8}V{y(0):.1f}" class="limit"/>')
        parts.append(f'<text x="{x(one.limit):.1f}" y="{top - 12}"{anchor}>{escape(option)} {one.limit:,}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _ticks(last: float) -> list[int]:
    """Round lengths from 0 to the last, about five."""
    step = 10 ** math.floor(math.log10(max(last, 1.0)))
    while last / step < 4 and step > 1:
        step = step // 2 if step % 2 == 0 else max(1, step // 5)
    return list(range(0, int(last) + 1, max(1, step)))
