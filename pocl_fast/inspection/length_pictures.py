"""A histogram of lengths, drawn as text for a terminal or as SVG for a page.

Does not know what the lengths are of, nor how they were counted.
"""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
from markupsafe import Markup, escape

from pocl_fast.inspection.lengths import Histogram

_ROWS = 10  # about so many, of text
_BAR = 40  # characters of the longest bar
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SMALL = 1e-6  # of a token: edges are no whole numbers


def as_text(one: Histogram, option: str) -> list[str]:
    """A line a bin, with a bar; the name of the limit behind the bin that ends at it, where any are over it. Bins are
    put together where there are many."""
    rows = _rows(one)
    most = max(count for _, _, count in rows)
    lines = []
    for start, end, count in rows:
        first, last = _first_and_last(one, start, end)
        said = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        limit = f"<- {option} {one.limit:,}" if one.over and _is_at(one, end) else ""
        lines.append(f"{said:>15} {count:>9,} {_bar(count / most)} {limit}".rstrip())
    return lines


def _rows(one: Histogram) -> list[tuple[float, float, int]]:
    """Bins as (start, end, count) without the empty ones before the shortest; some of them put together, but never
    those before the limit with those behind."""
    first = next(place for place, count in enumerate(one.counts) if count)
    bins = list(zip(one.edges, one.edges[1:], one.counts, strict=False))[first:]
    together = math.ceil(len(bins) / _ROWS)
    below = sum(not _is_over(one, start) for start, _, _ in bins)

    def group(place: int) -> int:
        return (place - below) // together  # from the limit to both sides

    groups = (list(some) for _, some in groupby(range(len(bins)), key=group))
    return [(bins[some[0]][0], bins[some[-1]][1], sum(bins[place][2] for place in some)) for some in groups]


def _bar(share: float) -> str:
    eighths = max(round(8 * _BAR * share), int(share > 0))
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()


def svg(one: Histogram, title: str, option: str) -> Markup:
    """A histogram with its limit; bars over the limit have the class "over". Drawn in the page's own colours."""
    wide, high, left, bottom, top = 480, 230, 46, 36, 40
    last, bins = one.edges[-1], len(one.counts)
    most = max(1, *one.counts)

    def x(length: float) -> float:
        return left + (wide - left - 12) * float(np.interp(length, one.edges, range(bins + 1))) / bins

    def y(count: float) -> float:
        return high - bottom - (high - bottom - top) * count / most

    parts = [f'<svg class="lengths" viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{left}" y="14" class="title">{escape(title)}</text>')
    for count in dict.fromkeys((0, most // 2, most)):
        parts.append(f'<path d="M{left} {y(count):.1f}H{wide - 12}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y(count) + 4:.1f}" text-anchor="end">{count:,}</text>')
    for start, end, count in zip(one.edges, one.edges[1:], one.counts, strict=False):
        if count:
            over = " over" if _is_over(one, start) else ""
            said = "{:,} to {:,} tokens: {:,}".format(*_first_and_last(one, start, end), count)
            parts.append(
                f'<rect class="bar{over}" x="{x(start):.1f}" y="{y(count):.1f}" width="{x(end) - x(start) - 0.6:.1f}"'
                f' height="{y(0) - y(count):.1f}"><title>{said}</title></rect>'
            )
    for length in _ticks(one):
        parts.append(f'<text x="{x(length):.1f}" y="{high - 20}" text-anchor="middle">{length:,.0f}</text>')
    more = ", the last bar: all that are longer" if one.longest > last + _SMALL else ""
    parts.append(f'<text x="{left}" y="{high - 4}">tokens{more}</text>')
    if one.edges[0] - _SMALL <= one.limit <= last + _SMALL:
        anchor = ' text-anchor="end"' if x(one.limit) > wide / 2 else ""
        parts.append(f'<path d="M{x(one.limit):.1f} {top - 8}V{y(0):.1f}" class="limit"/>')
        parts.append(f'<text x="{x(one.limit):.1f}" y="{top - 12}"{anchor}>{escape(option)} {one.limit:,}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _first_and_last(one: Histogram, start: float, end: float) -> tuple[int, int]:
    """The whole lengths of a bin; the last one has all that are longer."""
    last = max(one.longest, end) if end == one.edges[-1] else end
    return math.floor(start + _SMALL) + 1, math.floor(last + _SMALL)


def _is_over(one: Histogram, start: float) -> bool:
    return start >= one.limit - _SMALL


def _is_at(one: Histogram, end: float) -> bool:
    return abs(end - one.limit) <= _SMALL


def _ticks(one: Histogram) -> list[float]:
    """About five lengths: round ones from 0 to the last, or edges where bins differ in width."""
    widths = np.diff(one.edges)
    if widths.max() > widths.min() * 1.5:
        return list(one.edges[:: max(1, math.ceil(len(one.edges) / 7))])
    last = one.edges[-1]
    step = 10 ** math.floor(math.log10(max(last, 1.0)))
    while last / step < 4 and step > 1:
        step = step // 2 if step % 2 == 0 else max(1, step // 5)
    return [float(length) for length in range(0, int(last) + 1, max(1, step))]
