"""A sample as token ids, and which of them are trained on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TypeAlias

from pocl_fast.records.samples import Sample

Span: TypeAlias = tuple[int, int]  # from, to


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids: what a model is asked with, and the answer to it. `response_ids` end with the end-of-turn
    token unless `truncated`."""

    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    truncated: bool
    supervised: tuple[Span, ...] = ()  # the tokens that are trained on, where these are not the response alone

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self.prompt_ids + self.response_ids

    @property
    def spans(self) -> tuple[Span, ...]:
        """The supervised tokens, as places among `ids`: from, to; ascending, apart, none empty, none at place 0."""
        return self.supervised or ((len(self.prompt_ids), len(self)),)

    @property
    def supervised_count(self) -> int:
        """How many tokens are supervised."""
        return sum(end - start for start, end in self.spans)

    @cached_property  # asked for at every step
    def fingerprint(self) -> bytes:
        """16 bytes that identify the tokens, and which of them are supervised and the response."""
        digest = hashlib.sha256(str((len(self.prompt_ids), *self.supervised)).encode())
        digest.update(array("q", self.ids).tobytes())
        return digest.digest()[:16]


@dataclass(frozen=True)
class Fitted:
    """A sample as it is used, and its tokens: it may end earlier than it was given, and be without reasoning."""

    sample: Sample
    encoded: EncodedSample | None
    asked: int  # tokens before the first answer that is trained on; 0 where none is
    length: int  # tokens of the whole sample, before a limit cut it
    trained: tuple[int, ...] = ()  # the answers that are trained on: their places among the turns; the last is behind
    lost: tuple[int, ...] = ()  # turns that a limit took out of the prompt: their places before


class SharedIds:
    """One object for each token id: 8 bytes a token of samples that are kept, in place of 36."""

    def __init__(self) -> None:
        self._known: list[int] = []

    def of(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as shared objects."""
        if len(ids) < 2:
            return tuple(ids)
        try:
            return itemgetter(*ids)(self._known)  # a third of the time of a map
        except IndexError:
            self._known += range(len(self._known), max(ids) + 1)
            return itemgetter(*ids)(self._known)
