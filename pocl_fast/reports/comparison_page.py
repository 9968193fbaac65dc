"""A comparison as one page in one file: tables, notes, and the curves of all runs over each other.

Knows a comparison and its runs' curves. Does not know how they were computed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from pocl_fast.reports.compared_methods import Method
from pocl_fast.reports.compared_runs import Curve
from pocl_fast.reports.comparison import Comparison
from pocl_fast.reports.comparison_tables import tables_of
from pocl_fast.version import __version__

# Okabe and Ito's colours (Color Universal Design, 2008) but black and yellow, darkened or lightened where they would
# not be seen on white and on black alike; then lines that are dashed in the same colours
COLOURS = ("#0a77bd", "#d55e00", "#009e73", "#c2679a", "#b58900", "#3fa9e0", "#8a6fd1", "#8d8d8d")
DASHES = ("", "6 3", "2 2", "8 2 2 2")
_METHOD = "method-"  # before a method's place, the class of its curves
_INK = "#010203"  # stands for the page's own colour of text in a picture
_CURVES = (
    ("rouge_l", "Held-out ROUGE-L of greedy answers", "ROUGE-L, 0 to 100"),
    ("cross_entropy", "Held-out cross-entropy", "nats a token"),
)


@dataclass(frozen=True)
class _Key:
    """A method in the legend."""

    label: str
    name: str
    colour: str
    dashes: str


def page_of(comparison: Comparison) -> str:
    """The page as HTML; it loads nothing."""
    template = Environment(
        loader=PackageLoader("pocl_fast.reports", "."), autoescape=select_autoescape(default=True)
    ).get_template("comparison.jinja")
    tables = tables_of(comparison, all_pairs=True)
    drawn = [(title, _picture(comparison.methods, metric, unit)) for metric, title, unit in _CURVES]
    without = sum(not run.curve("rouge_l").steps.size for method in comparison.methods for run in method.runs)
    return template.render(
        version=__version__,
        title=f"{len(comparison.methods)} methods, {sum(len(method.runs) for method in comparison.methods)} runs",
        legend=_legend(comparison),
        pictures=[(title, picture) for title, picture in drawn if picture],
        runs_without_curves=without,
        several=any(len(method.runs) > 1 for method in comparison.methods),
        scores=[table for table in tables if table.words > 1],
        differences=[table for table in tables if table.words == 1],
        notes=comparison.notes,
    ) + "\n"  # fmt: skip


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves, over the steps that all of them reach: at every step at which one was measured, with
    the others read between their own steps."""
    known = [curve for curve in curves if curve.steps.size]
    if not known:
        return Curve(np.empty(0), np.empty(0))
    first, last = max(curve.steps[0] for curve in known), min(curve.steps[-1] for curve in known)
    every = np.unique(np.concatenate([curve.steps for curve in known]))
    steps = every[(every >= first) & (every <= last)]
    values = [np.interp(steps, curve.steps, curve.values) for curve in known]
    return Curve(steps, np.mean(values, axis=0) if steps.size else np.empty(0))


def style_of(place: int) -> tuple[str, str]:
    """The colour and the dashes of the method at a place, for SVG."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def _legend(comparison: Comparison) -> list[_Key]:
    return [_Key(method.label, method.name, *style_of(place)) for place, method in enumerate(comparison.methods)]


def _picture(methods: Sequence[Method], metric: str, unit: str) -> Markup | None:
    """The curves of all methods as SVG: thin lines are runs, bold ones means. None where no run has any."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = [[curve for run in method.runs if (curve := run.curve(metric)).steps.size] for method in methods]
    if not any(curves):
        return None
    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    axis = figure.subplots()
    for place, of_method in enumerate(curves):
        colour, dashes = style_of(place)
        line: dict[str, Any] = {"color": colour, "solid_capstyle": "round", "gid": f"{_METHOD}{place}"}
        line["linestyle"] = (0, tuple(map(float, dashes.split()))) if dashes else "-"
        for curve in of_method if len(of_method) > 1 else ():
            axis.plot(curve.steps, curve.values, lw=0.7, alpha=0.55, **line)
        mean = mean_curve(of_method)
        marks: dict[str, Any] = {"marker": "o", "ms": 3} if mean.steps.size < 25 else {}
        axis.plot(mean.steps, mean.values, lw=2.2 if len(methods) <= len(COLOURS) else 1.5, **line, **marks)
    axis.set(xlabel="optimizer step", ylabel=unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.18, color=_INK)
    axis.tick_params(colors=_INK, labelsize=10)
    for ink in (axis.xaxis.label, axis.yaxis.label):
        ink.set_color(_INK)
    axis.spines[["left", "bottom"]].set_color(_INK)
    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": metric}):
        figure.savefig(written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return _within_page(written.getvalue())


def _within_page(svg: str) -> Markup:
    """A picture of matplotlib as a part of a page: in the page's colours and fonts, as wide as there is room, and
    without names that two pictures would share."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(rf'<g id="({_METHOD}\d+)"', r'<g class="curve \1"', svg)  # which the legend lights up
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return Markup(svg.replace(_INK, "currentColor"))
