"""The lines of a JSON Lines file as dicts; what is wrong with a line that is none, in one error.

Knows UTF-8 and JSON. Does not know what the objects mean (samples.py), nor how the file is packed (file_kinds.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from pocl_fast.records.bad_records import BadRecord

DEEP = "nested too deeply"  # the kind of such a record
UNDECODED = "surrogateescape"  # how a file is decoded here: bytes that are not UTF-8 are a fault of their line alone
_BOM = "\ufeff"  # of UTF-8: Excel and PowerShell put it before a file's text, and `cat` between two


def objects(path: Path, lines: IO[str], expected: str) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """The objects of a file's text, each with the number of its line, from 1. Blank lines are passed over.

    Lines end with LF, CRLF or CR; a byte order mark is no part of a line. `expected` says in errors what a line should
    be. A line that is no object or not UTF-8 (`UNDECODED`), names a field twice, or is JSON that Python cannot hold is
    a `BadRecord` in its place, which names file and line.
    """
    first = ""
    for number, text in enumerate(lines, start=1):
        if text[0] == _BOM:
            text = text[1:]
        if not text or text.isspace():
            continue
        first = first or text
        if not text.isascii() and (byte := _undecoded(text)):
            yield number, BadRecord(f"{path}, line {number}, is not UTF-8 text (byte {byte}){_LATIN}", "not UTF-8")
            continue
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            reason = _reason(text, first, error)
            said = f"{path}, line {number}: {reason}; expected one object a line, {expected}"
            yield number, BadRecord(said, DEEP if isinstance(error, RecursionError) else "not JSON")
            continue
        if not isinstance(value, dict):
            array = _ARRAY if isinstance(value, list) else ""
            kind = type(value).__name__
            said = f"{path}, line {number}: expected a JSON object, got {kind}{array}; expected {expected}"
            yield number, BadRecord(said, "no object")
            continue
        yield number, value


_ARRAY = (
    ". A file holds one array, or an object a line: `jq -c 'if type == \"array\" then .[] else . end' FILE` writes each"
    " object in a line of its own"
)


def _undecoded(text: str) -> str:
    """The first byte of a text that could not be decoded, in hexadecimal; "" where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"0x{ord(text[error.start]) - 0xDC00:02x}"
    return ""


_LATIN = ": where it is Latin-1, `iconv -f LATIN1 -t UTF-8 FILE` rewrites it"


class _NamedTwice(ValueError):
    """An object has two fields of one name."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _NamedTwice(next(name for name in names if names.count(name) > 1))
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def decoded(text: str) -> Any:
    """The value of JSON text. Raises ValueError and RecursionError, which `in_words` names: for a field that is named
    twice as well."""
    return _DECODER.decode(text)


def first_of(text: str, start: int) -> tuple[Any, int]:
    """The value of the JSON text from `start` on, and where it ends. Raises as `decoded` does."""
    return _DECODER.raw_decode(text, start)


def in_words(error: Exception) -> str:
    """Why `decoded` or `first_of` failed."""
    if isinstance(error, _NamedTwice):
        return _named_twice(error)
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply for Python's json"
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"a number has more digits than Python reads ({sys.get_int_max_str_digits()}): write it as text"


def _named_twice(error: Exception) -> str:
    return f'the field "{error}" is named twice, and one of the two would be lost'


def _reason(text: str, first: str, error: Exception) -> str:
    """Why a line is not read, in words; `first` is the file's first line that is not blank."""
    if not isinstance(error, json.JSONDecodeError):
        return in_words(error)
    reason = f"not JSON ({error.msg}, column {error.colno})"
    if "\x00" in text:
        return f"{reason}: it has NUL bytes, as damaged files and UTF-16 have"
    if text.lstrip().startswith("["):
        return reason + _ARRAY
    if "," in first and not first.lstrip().startswith("{") and text == first:
        return f"{reason}: if it is CSV, `pandas.read_csv(FILE).to_json(NEW, orient='records', lines=True)` rewrites it"
    if error.msg == "Extra data":
        return f"{reason}: something follows the object"
    open_ended = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    if text.lstrip().startswith("{") and open_ended:
        return (
            f"{reason}: the object does not end on its line. The file is cut off there, or it is pretty-printed JSON,"
            " which `jq -c . FILE` writes an object a line"
        )
    return reason


def undecodable_line(file: BinaryIO) -> int | None:
    """The number of the first line of a file's bytes that is not UTF-8."""
    return next((number for number, line in _byte_lines(file) if not _is_utf_8(line)), None)


def _byte_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    for line in file:
        for part in line.replace(b"\r\n", b"\n").replace(b"\r", b"\n").splitlines():
            number += 1
            yield number, part


def _is_utf_8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
