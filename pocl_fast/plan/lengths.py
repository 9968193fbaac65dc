"""How long the samples of a data set are: quantiles and a histogram.

Knows tokens. Does not know how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocl_fast.data.encoded import EncodedSample

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 12  # about so many even bins
SPREAD = 12  # where the longest has so many times the median's tokens, even bins would leave all but one empty


@dataclass(frozen=True)
class LengthHistogram:
    """How many prompts and samples have so many tokens: those of bin i from `edges[i]` to before `edges[i + 1]`."""

    edges: tuple[int, ...]  # tokens, ascending; one more than there are bins
    prompts: tuple[int, ...]  # prompts in each bin
    samples: tuple[int, ...]  # samples in each bin, by the tokens of prompt and response


def length_histogram(encoded: Sequence[EncodedSample], *, bins: int = BINS) -> LengthHistogram:
    """The histogram of prompts and of whole samples over the same bins: about `bins` even ones of a round width, or
    doubling ones where a few samples are far longer than the others."""
    prompts = np.array([one.spans[0][0] for one in encoded], dtype=np.int64)
    samples = np.array([len(one) for one in encoded], dtype=np.int64)
    if not len(encoded):
        return LengthHistogram((0, 1), (0,), (0,))
    shortest, longest = int(prompts.min()), int(samples.max())
    if longest > SPREAD * float(np.median(samples)):
        edges = [1 << power for power in range(shortest.bit_length() - 1, longest.bit_length() + 1)]
    else:
        width = _round_width((longest - shortest + 1) / bins)
        first = shortest // width * width
        edges = list(range(first, longest + width + 1, width))
        edges = edges[: next(i for i, edge in enumerate(edges) if edge > longest) + 1]
    counts = (np.histogram(values, [*edges[:-1], edges[-1]])[0] for values in (prompts, samples))
    return LengthHistogram(tuple(edges), *(tuple(int(n) for n in one) for one in counts))


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """The lengths at `QUANTILES`, by percent: "0" the shortest, "50" the median, "100" the longest; each is the length
    of a sample. Empty for no lengths."""
    if not len(lengths):
        return {}
    values = np.quantile(np.asarray(lengths), QUANTILES, method="inverted_cdf")
    return {f"{100 * at:g}": int(value) for at, value in zip(QUANTILES, values, strict=True)}


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no less."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= least:
                return factor * unit
        unit *= 10
