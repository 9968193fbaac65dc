"""Files of records as sources: one file of any form, or several files as one.

Knows which reader is for which form. Does not know what a record says (samples.py).
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.records import json_array, json_lines, tables
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.file_kinds import UNPACKING_ERRORS, Form, Opened, opened, stops, unpacked_size
from pocl_fast.system.errors import InputError
from pocl_fast.system.fingerprint import file_fingerprint

LARGE = 1 << 28  # bytes; more samples than this are read in pieces, where they would take ten times as much
_UNITS: dict[Form, str] = {"lines": "line", "array": "record", "parquet": "row", "arrow": "row"}


def is_large(size: int) -> bool:
    """Whether records of that many bytes, as JSON or Arrow, are better not all in memory at once as samples."""
    return size >= LARGE


class File:
    """A file of JSON Lines, a JSON array, Parquet or Arrow, compressed or not: its bytes say which."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path.expanduser(), name or str(path)
        self._found: Form | None = None
        self._at = (0, 0)  # the number of the last object of an array, and its line

    @property
    def form(self) -> Form:
        """What the file is. A pipe is not looked into before it is read."""
        if self._found is None:
            if not self.path.is_file():
                return "lines"
            with self._opened() as found:
                self._found = found.form
        return self._found

    @property
    def unit(self) -> str:
        return _UNITS[self.form]

    def place(self, number: int) -> str:
        line = f" (line {self._at[1]})" if self._at[0] == number else ""
        return f"{self.name}, {self.unit} {number}{line}"

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)

    def is_large(self) -> bool:
        return self.path.is_file() and is_large(self.size())

    def size(self) -> int:
        """About how many bytes the records have in memory as Arrow or JSON, unpacked."""
        if self.form == "parquet":
            try:
                return tables.parquet_bytes(pq.read_metadata(self.path))
            except (pa.ArrowException, OSError):  # packed, or damaged, which reading says
                pass
        return unpacked_size(self.path)

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        """Raises `InputError` naming the file, and the line or row, for what cannot be read."""
        with self._opened() as found:
            self._found, number = found.form, 0
            try:
                for number, record in self._records(found, expected):
                    yield number, record
            except UNPACKING_ERRORS as error:
                if not found.packed:
                    raise
                reached = f"after {self.unit} {number}" if number else "before its first record"
                raise stops(Path(self.name), found, error, reached) from error
            except UnicodeDecodeError as error:
                line = self._undecodable_line()
                raise InputError(f"{self.name}{line} is not UTF-8 text ({error.reason})") from error

    def _records(self, found: Opened, expected: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        name = Path(self.name)
        if found.form == "lines":
            text = io.TextIOWrapper(found.content, encoding="utf-8", errors=json_lines.UNDECODED)
            yield from json_lines.objects(name, text, expected)
        elif found.form == "array":
            array = json_array.Objects(name, io.TextIOWrapper(found.content, encoding="utf-8"), expected)
            for number, record in enumerate(array, start=1):
                self._at = (number, array.line)
                yield number, record
        else:
            read = tables.parquet_rows if found.form == "parquet" else tables.arrow_rows
            if found.packed or not self.path.is_file():  # such files are read from their end
                with tempfile.NamedTemporaryFile(suffix=f".{found.form}") as copy:
                    shutil.copyfileobj(found.content, copy, 1 << 20)
                    copy.flush()
                    yield from read(Path(copy.name), name)
            else:
                yield from read(self.path, name)

    @contextmanager
    def _opened(self) -> Iterator[Opened]:
        try:
            with opened(self.path) as found:
                yield found
        except OSError as error:
            raise InputError(f"cannot read {self.name}: {error.strerror or error}") from error

    def _undecodable_line(self) -> str:
        """ ", line N," of the first line that is not UTF-8; nothing where the file cannot be read a second time."""
        try:
            with opened(self.path) as again:
                number = json_lines.undecodable_line(again.content)
        except UNPACKING_ERRORS:
            return ""
        return "" if number is None else f", line {number},"


class Files:
    """Several files one behind the other, as parts of one set. Their records are numbered through."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self._files = [File(path) for path in paths]
        self._at = (0, "")  # the number of the last record, and its place in its file

    @property
    def unit(self) -> str:
        units = {file.unit for file in self._files}
        return units.pop() if units == {"row"} else "record"

    def place(self, number: int) -> str:
        return self._at[1] if self._at[0] == number else f"{self.name}, {self.unit} {number}"

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        count = 0
        for file in self._files:
            for number, record in file.records(expected):
                count += 1
                self._at = (count, file.place(number))
                yield count, record

    def fingerprint(self) -> str:
        return combined(file.path for file in self._files)

    def is_large(self) -> bool:
        return is_large(sum(file.size() for file in self._files))


def combined(paths: Iterable[Path]) -> str:
    """SHA-256 of the content of several files in their order, in hexadecimal."""
    return hashlib.sha256(" ".join(file_fingerprint(path) for path in paths).encode()).hexdigest()
