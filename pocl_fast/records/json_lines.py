"""The lines of a JSON Lines file as dicts; what is wrong with a file or a line that is none, in one error.

Knows bytes, UTF-8 and JSON. Does not know what the objects mean (samples.py).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.system.errors import InputError

_PACKED = "unpack it first"
_TABLE = "write it as JSON Lines (`datasets.Dataset.to_json`), or give a trainer the `datasets.Dataset`"
_UTF_16 = "write it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)"
_UTF_32 = "write it as UTF-8 (`iconv -f UTF-32 -t UTF-8`)"
# how files of other kinds begin; UTF-32 before UTF-16, which begins alike
_KINDS = (
    (b"\x1f\x8b", "gzip", _PACKED),
    (b"BZh", "bzip2", _PACKED),
    (b"\xfd7zXZ\x00", "xz", _PACKED),
    (b"\x28\xb5\x2f\xfd", "Zstandard", _PACKED),
    (b"PK\x03\x04", "zip (also .xlsx)", _PACKED),
    (b"PAR1", "Parquet", _TABLE),
    (b"ARROW1", "Arrow", _TABLE),
    (b"\xff\xff\xff\xff", "Arrow", _TABLE),
    (b"\xff\xfe\x00\x00", "UTF-32 text", _UTF_32),
    (b"\x00\x00\xfe\xff", "UTF-32 text", _UTF_32),
    (b"{\x00\x00\x00", "UTF-32 text", _UTF_32),
    (b"\x00\x00\x00{", "UTF-32 text", _UTF_32),
    (b"\xff\xfe", "UTF-16 text", _UTF_16),
    (b"\xfe\xff", "UTF-16 text", _UTF_16),
    (b"{\x00", "UTF-16 text", _UTF_16),
    (b"\x00{", "UTF-16 text", _UTF_16),
    (b"version https://git-lfs", "Git LFS pointer", "get the file itself with `git lfs pull`"),
)
DEEP = "nested too deeply"  # the kind of such a record
_BOM = "\ufeff"  # of UTF-8: Excel and PowerShell put it before a file's text, and `cat` between two


def objects(path: Path, expected: str) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """The objects of a file, each with the number of its line, from 1. Blank lines are passed over.

    Lines end with LF, CRLF or CR; a byte order mark is no part of a line. `expected` says in errors what a line should
    be. A line that is no object, names a field twice, or is JSON that Python cannot hold is a `BadRecord` in its place,
    which names file and line. Raises `InputError` naming the file for one of another kind.
    """
    try:
        with open(path, "rb") as file:
            _check_kind(path, file)
            yield from _objects(path, io.TextIOWrapper(file, encoding="utf-8"), expected)
    except IsADirectoryError as error:
        raise InputError(f"cannot read {path}: it is a folder; give a file of JSON Lines") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}{_undecodable_line(path)} is not UTF-8 text ({error.reason})") from error


def _check_kind(path: Path, file: io.BufferedReader) -> None:
    head = file.peek(32)
    for begins, kind, advice in _KINDS:
        if head.startswith(begins):
            raise InputError(f"{path} is no JSON Lines, it looks like {kind} and not UTF-8 text: {advice}")


def _objects(path: Path, lines: io.TextIOWrapper, expected: str) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    first = ""
    for number, text in enumerate(lines, start=1):
        if text[0] == _BOM:
            text = text[1:]
        if not text or text.isspace():
            continue
        first = first or text
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            reason = _reason(text, first, error)
            said = f"{path}, line {number}: {reason}; expected one object a line, {expected}"
            yield number, BadRecord(said, DEEP if isinstance(error, RecursionError) else "not JSON")
            continue
        if not isinstance(value, dict):
            kind = type(value).__name__
            array = _ARRAY if kind == "list" and text is first else ""
            said = f"{path}, line {number}: expected a JSON object, got {kind}{array}; expected {expected}"
            yield number, BadRecord(said, "no object")
            continue
        yield number, value


_ARRAY = "; the file looks like a JSON array: `jq -c '.[]' FILE` writes its objects a line each"


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


def in_words(error: Exception) -> str:
    """Why `decoded` failed."""
    return _named_twice(error) if isinstance(error, _NamedTwice) else str(error)


def _named_twice(error: Exception) -> str:
    return f'the field "{error}" is named twice, and one of the two would be lost'


def _reason(text: str, first: str, error: Exception) -> str:
    """Why a line is not read, in words; `first` is the file's first line that is not blank."""
    if isinstance(error, _NamedTwice):
        return _named_twice(error)
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply for Python's json"
    if not isinstance(error, json.JSONDecodeError):
        return f"a number has more digits than Python reads ({sys.get_int_max_str_digits()}): write it as text"
    reason = f"not JSON ({error.msg}, column {error.colno})"
    if "\x00" in text:
        return f"{reason}: it has NUL bytes, as damaged files and UTF-16 have"
    if first.lstrip().startswith("["):
        return reason + _ARRAY
    if error.msg == "Extra data":
        return f"{reason}: something follows the object"
    open_ended = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    if text.lstrip().startswith("{") and open_ended:
        return (
            f"{reason}: the object does not end on its line. The file is cut off there, or it is pretty-printed JSON,"
            " which `jq -c . FILE` writes an object a line"
        )
    return reason


def _undecodable_line(path: Path) -> str:
    """ ", line N" of the first line that is not UTF-8; nothing where the file cannot be read a second time."""
    try:
        with open(path, "rb") as file:
            return next((f", line {number}," for number, line in _byte_lines(file) if not _is_utf_8(line)), "")
    except OSError:
        return ""


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
