"""What the rank step shows of the measured difficulty: a table, a picture, and samples of each stage.

Knows a difficulty table and the curriculum made from it. Does not know training, nor the report's page.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pocl_fast.curriculum.blind_signals import average_ranks, correlations, largest_group, signal_lines
from pocl_fast.curriculum.fusion import Ties
from pocl_fast.curriculum.scores import SignalScores, read_scores
from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import Curriculum, is_measured
from pocl_fast.settings.configuration import recorded_config
from pocl_fast.system.errors import InputError

STAGE_COLOURS = ("#1f5fa8", "#d1603d", "#3a7d44", "#7b4ea3")
POINTS = 4000  # in the scatter: more hide each other
BINS = 40


@dataclass(frozen=True)
class Ranked:
    """Samples with their scores, and the stages over them."""

    known: SignalScores
    curriculum: Curriculum
    k: float  # the constant of the rank fusion
    ties: Ties = "average"
    hard_first: bool = False  # whether the order is turned round

    @cached_property
    def stage_of(self) -> np.ndarray:
        """The stage that adds each sample, -1 for a sample of no stage: [samples] int32, in the scores' order."""
        row_of = np.full(int(self.known.index.max(initial=-1)) + 1, -1, dtype=np.int64)
        row_of[self.known.index] = np.arange(len(self.known.index))
        stages = np.full(len(self.known.index), -1, dtype=np.int32)
        for stage, new in enumerate(self.new_samples()):
            stages[row_of[new]] = stage
        return stages

    def new_samples(self) -> list[np.ndarray]:
        """The sample indices that each stage adds to those of the stages before, in the curriculum's order."""
        sizes = [0, *(stage.size for stage in self.curriculum.stages)]
        return [self.curriculum.order[before:size] for before, size in itertools.pairwise(sizes)]

    @cached_property
    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation of the first two signals, to two decimals; see `correlations`. None for a single
        signal, and where all scores of one are equal."""
        if len(self.known.signals) < 2 or np.isnan(found := correlations(self.known)[0, 1]):
            return None
        return round(float(found), 2) + 0.0  # not -0.00

    def hardness(self, count: int) -> list[np.ndarray]:
        """The first two signals' scores of about `count` samples, with signs that make easy samples low."""
        return self.known.hardness(count)[:2]

    def ranks(self, count: int) -> list[np.ndarray]:
        """Their ranks among these, from 1, as the fusion ranks them."""
        of = average_ranks if self.ties == "average" else ordinal_ranks
        return [of(hardness) for hardness in self.hardness(count)]


def read_ranked(run: Path) -> Ranked | None:
    """What a run directory has ranked by difficulty; None before the rank step, and where another order was taken.

    Raises `InputError` where the difficulty table and the curriculum are of different samples.
    """
    table, stages = run / "difficulty.parquet", run / "curriculum.json"
    config = recorded_config(run)
    if not table.exists() or not stages.exists() or not is_measured(config.schedule):
        return None
    known = read_scores(table, chosen_signals(config.difficulty.signals))
    curriculum = Curriculum.load(stages)
    if not np.array_equal(np.sort(known.index), np.sort(curriculum.order)):
        raise InputError(f"{stages} ranks other samples than {table} has; delete it and run `pocl-fast rank` again")
    hard_first = config.schedule.curriculum == "reverse"
    return Ranked(known, curriculum, config.schedule.rrf_k, config.schedule.ties, hard_first)


def sampled(array: np.ndarray, count: int) -> np.ndarray:
    """Every n-th row, about `count` of them; all where there are no more."""
    return array[:: max(1, len(array) // count)]


@dataclass(frozen=True)
class StageRow:
    """A stage: how many samples it has and adds, its settings, and each signal's mean over the samples that it adds."""

    stage: int  # from 1
    samples: int
    new: int
    temperature: float
    alpha: float
    means: list[str]


@dataclass(frozen=True)
class SampleRow:
    """A sample as the difficulty table has it; texts that the table lacks are empty."""

    stage: int  # the one that adds it, from 1
    scores: list[str]  # by each signal
    prompt: str
    reference: str
    answer: str


def difficulty_table(ranked: Ranked) -> str:
    """A line a stage for the terminal, with lines around that say what the columns are."""
    signals = [one.signal for one in ranked.known.signals]
    heads = [f"mean {signal.name[-26:]}" for signal in signals]
    widths = [max(len(head), 12) + 3 for head in heads]
    count, stages = len(ranked.known.index), len(ranked.curriculum.stages)
    way = "hard to easy" if ranked.hard_first else "easy to hard"
    more = f"s, {way}; each stage adds new samples" if stages > 1 else f", {way}"
    lines = [f"rank: {count:,} samples in {stages} stage{more}"]
    columns = zip(heads, widths, strict=True)
    lines.append(
        f"{'stage':<6}{'samples':>11}{'new':>11}{'temperature':>13}{'alpha':>7}"
        + "".join(f"{head:>{width}}" for head, width in columns)
    )
    for row in stage_rows(ranked):
        cells = zip(row.means, widths, strict=True)
        lines.append(
            f"{row.stage:<6}{row.samples:>11,}{row.new:>11,}{row.temperature:>13g}{row.alpha:>7g}"
            + "".join(f"{cell:>{width}}" for cell, width in cells)
        )
    lines += [f"{signal.name}: {signal.meaning} ({signal.easy} is easy)" for signal in signals]
    correlation = ranked.rank_correlation
    if correlation is not None:
        names = f"{signals[0].name} and {signals[1].name}"
        lines.append(f"rank correlation of {names}: {correlation:.2f} (1: they rank the samples alike)")
    return "\n".join(lines + tie_lines(ranked))


def tie_lines(ranked: Ranked) -> list[str]:
    """How many samples one score is that of, by each signal; and how many the file's order alone has put in their
    place, where the stages follow the fused scores."""
    N = len(ranked.known.index)
    groups = zip(ranked.known.signals, map(largest_group, ranked.known.scores), strict=True)
    shares = ", ".join(f"{one.signal.name} {100 * group.samples / max(1, N):.3g} %" for one, group in groups)
    lines = [f"largest group of samples with one score: {shares}"]
    rises = np.diff(ranked.curriculum.score)
    if len(ranked.curriculum.stages) < 2 or ((rises > 0).any() and (rises < 0).any()):
        return lines
    starts = np.flatnonzero(np.append(True, rises != 0))
    sizes = np.diff(np.append(starts, len(rises) + 1))
    cuts = np.array([stage.size for stage in ranked.curriculum.stages if stage.size < N], dtype=np.int64)
    cut_groups = np.unique(np.searchsorted(starts, cuts[rises[cuts - 1] == 0], side="right") - 1)
    lines.append(
        f"{sizes[sizes > 1].sum():,} of {N:,} samples share their fused score with others and follow the file's order"
        f" among these, which decides the stage of {sizes[cut_groups].sum():,}"
    )
    return lines


def difficulty_notes(ranked: Ranked) -> list[str]:
    """What the report says of the signals below the picture."""
    return tie_lines(ranked) + [line.text for line in signal_lines(ranked.known)]


def stage_rows(ranked: Ranked) -> list[StageRow]:
    """A row for each stage."""
    rows = []
    for stage, new in zip(ranked.curriculum.stages, ranked.new_samples(), strict=True):
        here = ranked.stage_of == stage.index
        means = [_mean(scores[here]) for scores in ranked.known.scores]
        rows.append(StageRow(stage.index + 1, stage.size, len(new), stage.temperature, stage.alpha, means))
    return rows


def sample_rows(ranked: Ranked, table: Path) -> list[SampleRow]:
    """Three of the samples that each stage adds: the first, the middle one and the last in the curriculum's order."""
    picked = []
    for stage, new in enumerate(ranked.new_samples()):
        places = sorted({0, len(new) // 2, len(new) - 1}) if len(new) else []
        picked += [(stage + 1, int(new[place])) for place in places]
    texts = [name for name in ("prompt", "reference", "answer") if name in pq.read_schema(table).names]
    wanted = pa.array([index for _, index in picked])
    found = pq.read_table(table, columns=["index", *texts], filters=pc.field("index").isin(wanted)).to_pylist()
    record_of = {record["index"]: record for record in found}
    row_of = {int(ranked.known.index[row]): int(row) for row in np.flatnonzero(np.isin(ranked.known.index, wanted))}
    rows = []
    for stage, index in picked:
        scores = [f"{scores[row_of[index]]:.3f}" for scores in ranked.known.scores]
        prompt, reference, answer = (record_of[index].get(name, "") for name in ("prompt", "reference", "answer"))
        rows.append(SampleRow(stage, scores, prompt, reference, answer))
    return rows


def difficulty_figure(ranked: Ranked) -> Any:
    """A histogram of each signal (three at most), coloured by the stage that adds the samples; and the ranks by the
    first two against each other, with the cuts between the stages where no third signal decides them too."""
    from matplotlib.figure import Figure

    histograms = list(zip(ranked.known.signals, ranked.known.scores, strict=True))[:3]
    panels = len(histograms) + (len(ranked.known.scores) > 1)
    figure = Figure(figsize=(4.4 * panels, 3.9), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, (one, scores) in zip(axes, histograms, strict=False):
        _histogram(axis, scores, ranked)
        axis.set(xlabel=one.signal.meaning, ylabel="samples", title=f"{one.signal.name} ({one.signal.easy} is easy)")
    if len(ranked.known.scores) > 1:
        _rank_scatter(axes[-1], ranked)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    sizes = [len(new) for new in ranked.new_samples()]
    labels = [f"stage {stage + 1}: {size:,} new samples" for stage, size in enumerate(sizes)]
    handles = [_patch(stage) for stage in range(len(sizes))]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(sizes), 6), frameon=False, fontsize=9)
    return figure


def _histogram(axis: Any, scores: np.ndarray, ranked: Ranked) -> None:
    finite = np.isfinite(scores)
    if not finite.any():
        axis.text(0.5, 0.5, "no scores", ha="center", transform=axis.transAxes)
        return
    axis.yaxis.get_major_locator().set_params(integer=True)
    edges = np.histogram_bin_edges(scores[finite], BINS)
    below = np.zeros(len(edges) - 1)
    for stage in range(len(ranked.curriculum.stages)):
        counts, _ = np.histogram(scores[finite & (ranked.stage_of == stage)], edges)
        axis.bar(edges[:-1], counts, np.diff(edges), bottom=below, align="edge", color=_colour(stage))
        below = below + counts


def _rank_scatter(axis: Any, ranked: Ranked) -> None:
    N = len(ranked.known.index)
    first, second = ranked.ranks(POINTS)
    stage_of, scale = sampled(ranked.stage_of, POINTS), N / len(first)
    size = min(40.0, max(6.0, 20_000 / len(first)))  # points², so that few are seen and many do not run together
    for stage in range(len(ranked.curriculum.stages)):
        here = stage_of == stage
        axis.scatter(scale * first[here], scale * second[here], s=size, alpha=0.6, color=_colour(stage), lw=0)
    correlation, names = ranked.rank_correlation, [one.signal.name for one in ranked.known.signals[:2]]
    title = "the two ranks" if correlation is None else f"rank correlation {correlation:.2f}"
    # a constant signal is left out of the fusion, and the cuts are not of two ranks
    if len(ranked.known.scores) == 2 and len(ranked.curriculum.stages) > 1 and correlation is not None:
        title += "; dashed: stage cuts"
        for cut in ranked.curriculum.stages[:-1]:
            axis.plot(*_cut(ranked, float(ranked.curriculum.score[cut.size - 1])), color="#333", lw=0.9, ls="--")
    axis.set(xlabel=f"rank by {names[0]}, 1 is easy", ylabel=f"rank by {names[1]}, 1 is easy", title=title)
    axis.set(xlim=(0, N + 1), ylim=(0, N + 1))


def ordinal_ranks(scores: np.ndarray) -> np.ndarray:
    """[samples] int64 ranks from 1, low scores first, ties by place, NaN last."""
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return rank


def _cut(ranked: Ranked, score: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve of all pairs of ranks whose fused score is `score`: first ranks, and the second rank of each (NaN where
    it would lie outside)."""
    N = len(ranked.known.index)
    first = np.linspace(1, N, 400)
    rest = score - ranked.known.signals[0].weight / (ranked.k + first)
    second = np.full_like(first, np.nan)
    second[rest > 0] = ranked.known.signals[1].weight / rest[rest > 0] - ranked.k
    second[(second < 1) | (second > N)] = np.nan
    return first, second


def _mean(scores: np.ndarray) -> str:
    """The mean of the known scores; a dash where there are none, as of a stage that adds no samples."""
    known = scores[~np.isnan(scores)]
    return f"{known.mean():.3f}" if len(known) else "-"


def _patch(stage: int) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=_colour(stage))


def _colour(stage: int) -> Any:
    from matplotlib import colormaps

    return STAGE_COLOURS[stage] if stage < len(STAGE_COLOURS) else colormaps["tab20"](stage % 20)
