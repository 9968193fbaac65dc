"""How long the samples of a data set are, in tokens, and what the limits take from them: counted once, for every place
that says it.

Does not know how samples become tokens, where the counts are kept, nor how they are drawn (length_pictures.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pocl_fast.data.length_report import LengthLimits, SampleLengths

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 30
SPREAD = 12  # where the longest has so many times the median's tokens, even bins would leave all but one empty
_BEYOND = 15  # even bins over a limit; the last one holds all that is longer
_SMALL = 1e-6  # of a token: edges are no whole numbers
_DONE = {"skip": "left out", "truncate-left": "shortened"}  # which is done about long prompts


@dataclass(frozen=True)
class Histogram:
    """How many of a kind have which length. Bin i holds lengths over edges[i], up to edges[i + 1]; the last one all
    that are longer, too. Where any are over the limit, it is an edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    quantiles: dict[str, int]  # percent -> length, as `quantiles` gives them
    limit: int
    over: int  # how many are over the limit

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def median(self) -> int:
        return self.quantiles["50"]

    @property
    def longest(self) -> int:
        return self.quantiles["100"]


@dataclass(frozen=True)
class Taken:
    """What a limit takes away."""

    samples: int  # that are shorter by it, or left out
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of a data set's prompts (what is before the first answer that is trained on) and of its samples
    (prompt and answers), before the limits; and what these take away. Samples in which nothing is trained on are left
    out of it."""

    prompts: Histogram
    samples: Histogram
    tokens: int  # of all these samples, before the limits
    by_prompt_limit: Taken  # of prompts over --max-prompt-length, with all of a sample that is left out for it
    by_length_limit: Taken  # behind --max-length, of what that leaves
    long_prompts: str  # what is done about prompts over the limit

    @property
    def kept(self) -> int:
        """The tokens of all samples, within the limits."""
        return self.tokens - self.by_prompt_limit.tokens - self.by_length_limit.tokens

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Lengths:
        histograms = {name: _from_json(known[name]) for name in ("prompts", "samples")}
        taken = {name: Taken(**known[name]) for name in ("by_prompt_limit", "by_length_limit")}
        return cls(**known | histograms | taken)


def _from_json(known: dict[str, Any]) -> Histogram:
    return Histogram(**known | {name: tuple(known[name]) for name in ("edges", "counts")})


def count_lengths(known: SampleLengths, limits: LengthLimits) -> Lengths:
    """The lengths of a data set that was read within limits, at least one sample of which is trained on."""
    asked, samples, shortened, kept = (
        np.array(one, dtype=np.int64) for one in (known.prompts, known.samples, known.shortened, known.kept)
    )
    trained = asked > 0
    asked, samples, shortened, kept = (one[trained] for one in (asked, samples, shortened, kept))
    return Lengths(
        histogram(asked, limits.max_prompt_length),
        histogram(samples, limits.max_length),
        int(samples.sum()),
        _taken(samples, shortened, asked > limits.max_prompt_length),
        _taken(shortened, kept, shortened > kept),
        limits.long_prompts,
    )


def _taken(before: np.ndarray, after: np.ndarray, of: np.ndarray) -> Taken:
    return Taken(int(of.sum()), int((before - after)[of].sum()))


def histogram(lengths: np.ndarray, limit: int) -> Histogram:
    """Lengths [samples] in bins of which one ends at the limit, where any are over it: bins of one width, or each twice
    as wide as the one before where a few are far longer than the others."""
    known = quantiles(lengths)
    edges = np.array(_doubling(known, limit) if known["100"] > SPREAD * known["50"] else _even(known["100"], limit))
    places = np.searchsorted(edges + _SMALL, lengths) - 1
    counts = np.bincount(np.clip(places, 0, len(edges) - 2), minlength=len(edges) - 1)
    return Histogram(
        tuple(map(float, edges)), tuple(map(int, counts)), known, limit, int((np.asarray(lengths) > limit).sum())
    )


def _even(longest: int, limit: int) -> list[float]:
    if longest <= limit:
        step = float(max(1, math.ceil(longest / BINS)))
        bins = max(1, math.ceil(longest / step))
    else:
        below = min(BINS - _BEYOND, limit)
        step = limit / below
        bins = below + min(_BEYOND, math.ceil((longest - limit) / step))
    return [step * place for place in range(bins + 1)]


def _doubling(known: dict[str, int], limit: int) -> list[float]:
    first = min(0, math.ceil(math.log2(known["0"] / limit)) - 1)  # the shortest is over its edge
    last = math.ceil(math.log2(known["100"] / limit))
    return [limit * 2.0**power for power in range(first, max(first + 1, last) + 1)]


def quantiles(lengths: Sequence[int] | np.ndarray) -> dict[str, int]:
    """The lengths at `QUANTILES`, by percent: "0" the shortest, "50" the median, "100" the longest; each is the length
    of a sample. Empty for no lengths."""
    if not len(lengths):
        return {}
    values = np.quantile(np.asarray(lengths), QUANTILES, method="inverted_cdf")
    return {f"{100 * at:g}": int(value) for at, value in zip(QUANTILES, values, strict=True)}


def in_words(lengths: Lengths) -> list[str]:
    """How long prompts and samples are, and what each limit takes from them, with counts."""
    prompts, samples = lengths.prompts, lengths.samples
    done = ""
    if prompts.over and lengths.long_prompts in _DONE:
        done = f": {_DONE[lengths.long_prompts]} (--long-prompts {lengths.long_prompts})"
    lines = [
        f"prompts: median {prompts.median:,} tokens, longest {prompts.longest:,};"
        f" {prompts.over:,} of {prompts.total:,} are over --max-prompt-length {prompts.limit:,}{done}",
        f"prompts with answers: median {samples.median:,} tokens, longest {samples.longest:,};"
        f" {samples.over:,} of {samples.total:,} are over --max-length {samples.limit:,}",
    ]
    lost = [(lengths.by_prompt_limit, "--max-prompt-length"), (lengths.by_length_limit, "--max-length")]
    parts = [f"{taken.tokens:,} to {option} ({_samples(taken)})" for taken, option in lost if taken.tokens]
    if parts:
        share = 100 * (1 - lengths.kept / lengths.tokens)
        lines.append(f"of {lengths.tokens:,} tokens {share:.1f} % are lost: {', '.join(parts)}")
    return lines


def _samples(taken: Taken) -> str:
    return "1 sample" if taken.samples == 1 else f"{taken.samples:,} samples"
