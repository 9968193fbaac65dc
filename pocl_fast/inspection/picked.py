"""Single records of a source, found by the numbers that messages name.

Does not know what a record says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import FORMATS
from pocl_fast.records.sources import Source
from pocl_fast.system.errors import InputError

Record = tuple[int, Mapping[str, Any] | BadRecord]  # its number, and its fields, or what is wrong with it


@dataclass(frozen=True)
class OneRecord:
    """A source of a single record of another one, under its number there."""

    source: Source
    record: Record

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def unit(self) -> str:
        return self.source.unit

    def place(self, number: int) -> str:
        return self.source.place(number)

    def records(self, expected: str) -> Iterator[Record]:
        return iter([self.record])

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def is_large(self) -> bool:
        return False


def picked(source: Source, first: int | None, count: int) -> list[Record]:
    """`count` records from the one numbered `first` on, or from the beginning; fewer where the source ends.

    Raises `InputError` where there is no record of that number, and says which there are.
    """
    if count < 1:
        raise InputError(f"--count must be at least 1, got {count}")
    if first is None:
        if found := list(islice(source.records(FORMATS), count)):
            return found
        raise InputError(f"{source.name} holds no sample; expected {FORMATS}")
    records = 0
    before = None
    each = source.records(FORMATS)
    for number, record in each:
        if number == first:
            return [(number, record), *islice(each, count - 1)]
        if number > first:
            beside = " and ".join(str(one) for one in (before, number) if one is not None)
            raise InputError(f"--line {first}: {source.name} has no record there; the next to it are {beside}")
        records, before = records + 1, number
    last = f"its {records:,} records end with {source.unit} {before}" if records else "it holds no record"
    raise InputError(f"--line {first}: {source.name} has no such {source.unit}, {last}")
