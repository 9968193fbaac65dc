"""Where each sample of a teacher cache is: from the sample's key to its place.

Knows keys and numbers. Does not know shards or files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.teacher.shards import KEY_BYTES


class SampleIndex:
    """Keys -> places (shard number << 32 | position in it), 24 bytes a sample.

    Keys lie in sorted runs, each more than twice as long as the next, so that adding a shard seldom sorts much.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        self._runs.append(_sorted(keys, places))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (a, b), (c, d) = self._runs.pop(), self._runs.pop()
            self._runs.append(_sorted(np.concatenate([a, c]), np.concatenate([b, d])))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key, -1 where it is not there."""
        places = np.full(len(keys), -1, np.int64)
        for known, where in self._runs:
            at = np.searchsorted(known, keys)
            at[at == len(known)] = 0
            places = np.where(known[at] == keys, where[at], places)
        return places

    def remove(self, first: int, last: int) -> None:
        """Forgets the places from `first` to before `last`."""
        kept = [(where < first) | (where >= last) for _, where in self._runs]
        runs = [(known[keep], where[keep]) for (known, where), keep in zip(self._runs, kept, strict=True)]
        self._runs = [run for run in runs if len(run[0])]


def _sorted(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys)
    return keys[order], places[order]


def keys_of(samples: Sequence[EncodedSample]) -> np.ndarray:
    """The samples' keys: [samples] of `KEY_BYTES` bytes."""
    return np.frombuffer(b"".join([sample.fingerprint for sample in samples]), f"S{KEY_BYTES}")
