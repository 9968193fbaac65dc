"""What kind of file a file is, by its first bytes, and its content unpacked.

Knows how files begin and how they are compressed. Does not know records.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pocl_fast.system.errors import InputError

Form = Literal["lines", "array", "parquet", "arrow"]
BLOCK = 1 << 18  # bytes that are unpacked at a time
_HEAD = 512  # bytes that a kind is known by
_UNPACK, _AGAIN = "unpack it first", "get the file again"
_UTF_16 = "write it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)"
_UTF_32 = "write it as UTF-8 (`iconv -f UTF-32 -t UTF-8`)"
_SHEET = "write it as JSON Lines (`pandas.DataFrame.to_json(FILE, orient='records', lines=True)`)"
_TEXT_ALONE = "give a file of records, whose prompts and answers are text"
_PAGE = "get the file itself, on the hub from its link `download` or with `hf download`"
# how files that hold no records begin; UTF-32 before UTF-16, which begins alike
_KINDS = (
    (b"PK\x03\x04", "zip (also .xlsx)", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "7z", _UNPACK),
    (b"\x04\x22\x4d\x18", "LZ4", _UNPACK),
    (b"PARE", "Parquet with encryption", "write it without"),
    (b"SQLite format 3\x00", "an SQLite database", _SHEET),
    (b"\x89HDF", "HDF5", _SHEET),
    (b"ORC", "ORC", "write it as Parquet"),
    (b"Obj\x01", "Avro", "write it as Parquet"),
    (b"\x80\x04", "a pickle", _SHEET),
    (b"\x80\x05", "a pickle", _SHEET),
    (b"\x93NUMPY", "a NumPy array", _SHEET),
    (b"\x89PNG", "a PNG image", _TEXT_ALONE),
    (b"\xff\xd8\xff", "a JPEG image", _TEXT_ALONE),
    (b"GIF8", "a GIF image", _TEXT_ALONE),
    (b"%PDF-", "a PDF", _TEXT_ALONE),
    (b"\xff\xfe\x00\x00", "UTF-32 text", _UTF_32),
    (b"\x00\x00\xfe\xff", "UTF-32 text", _UTF_32),
    (b"{\x00\x00\x00", "UTF-32 text", _UTF_32),
    (b"[\x00\x00\x00", "UTF-32 text", _UTF_32),
    (b"\x00\x00\x00{", "UTF-32 text", _UTF_32),
    (b"\x00\x00\x00[", "UTF-32 text", _UTF_32),
    (b"\xff\xfe", "UTF-16 text", _UTF_16),
    (b"\xfe\xff", "UTF-16 text", _UTF_16),
    (b"{\x00", "UTF-16 text", _UTF_16),
    (b"[\x00", "UTF-16 text", _UTF_16),
    (b"\x00{", "UTF-16 text", _UTF_16),
    (b"\x00[", "UTF-16 text", _UTF_16),
    (b"version https://git-lfs", "Git LFS pointer", "get the file itself with `git lfs pull`"),
)
_BOM = b"\xef\xbb\xbf"
_TABLES: tuple[tuple[bytes, Form], ...] = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
ARROW_STREAM = b"\xff\xff\xff\xff"  # how one begins

_SKIPPABLE = tuple(bytes((0x50 + i, 0x2A, 0x4D, 0x18)) for i in range(16))  # frames of Zstandard without content: pzstd
_PACKED: tuple[tuple[str, tuple[bytes, ...], Callable[[Any], Any]], ...] = (
    ("gzip", (b"\x1f\x8b",), lambda file: gzip.GzipFile(fileobj=file)),
    ("Zstandard", (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), lambda file: pa.CompressedInputStream(file, "zstd")),
    ("bzip2", (b"BZh",), lambda file: _Streams(file, bz2.BZ2Decompressor)),
    ("xz", (b"\xfd7zXZ\x00",), lambda file: _Streams(file, lzma.LZMADecompressor)),
)
UNPACKING_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)  # pyarrow's are OSErrors


@dataclass(frozen=True)
class Opened:
    """A file's unpacked content, how it was packed, and what it is."""

    content: io.BufferedReader
    packed: tuple[str, ...]  # "gzip", from the outside in; empty where it is not packed
    form: Form


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Opens a file. Raises `InputError` for one that cannot be opened, and for one of a kind that holds no records,
    naming it and saying what to do."""
    with open(path, "rb") as file:
        content, packed = file, []
        try:
            while way := _packed(head := _beginning(content)):
                packed.append(way[0])
                content = io.BufferedReader(_Unpacking(content, way[1]), BLOCK)
        except UNPACKING_ERRORS as error:
            if not packed:
                raise
            raise InputError(f"{path}: {_damage(packed, error)} before its first record: {_AGAIN}") from error
        yield Opened(content, tuple(packed), _form(path, head, packed))


class _Streams:
    """The content of streams of bzip2 or xz one behind the other. Python's own readers take a stream whose beginning
    is damaged for the file's end, and all behind it would be lost without a word."""

    def __init__(self, file: Any, unpacker: Callable[[], Any]) -> None:
        self._file, self._new = file, unpacker
        self._unpacker = unpacker()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises for what is missing, and for what is no stream."""
        while True:
            packed = b""
            if self._unpacker.eof:
                packed = self._unpacker.unused_data.lstrip(b"\x00")  # which pads streams
                while not packed:
                    if not (piece := self._file.read(BLOCK)):
                        return b""
                    packed = piece.lstrip(b"\x00")
                self._unpacker = self._new()
            elif self._unpacker.needs_input and not (packed := self._file.read(BLOCK)):
                raise EOFError("the end of the stream is missing")
            if unpacked := self._unpacker.decompress(packed, size):
                return unpacked  # type: ignore[no-any-return]


class _Unpacking(io.RawIOBase):
    """Unpacked content, whose reading gives all that there is before it raises for what is missing."""

    def __init__(self, packed: io.BufferedReader, unpacks: Callable[[Any], Any]) -> None:
        self._packed, self._unpacks = packed, unpacks
        self._stream = unpacks(packed)
        self._given = 0
        self._rest: bytes | None = None  # what there is before `_error`
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error is None:
            try:
                piece = self._stream.read(min(len(buffer), BLOCK))
            except UNPACKING_ERRORS as error:
                self._error = error
                self._rest = self._before_the_error() if self._packed.seekable() else b""
        if self._error is not None:
            piece, self._rest = (self._rest or b"")[: len(buffer)], (self._rest or b"")[len(buffer) :]
            if not piece:
                raise self._error
        self._given += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)

    def _before_the_error(self) -> bytes:
        """What a read would have given that failed as a whole: unpacked once more, at its end byte by byte."""
        self._packed.seek(0)
        closes, self._stream = self._stream, self._unpacks(self._packed)
        left, rest = self._given, bytearray()
        with contextlib.suppress(*UNPACKING_ERRORS):
            while left:
                left -= len(self._stream.read(min(left, BLOCK)))
            while piece := self._stream.read(1):
                rest += piece
        del closes  # not earlier: pyarrow closes the file with it
        return bytes(rest)


def stops(path: Path, opened: Opened, error: Exception, reached: str) -> InputError:
    """The error for packed content that ends early or is damaged. `reached`: "after line 7"."""
    return InputError(f"{path}: {_damage(opened.packed, error)} {reached}: {_AGAIN}")


def _damage(packed: Any, error: Exception) -> str:
    kind = " in ".join(reversed(packed))
    said = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in said or "end of file" in said:
        return f"the file ends early ({kind} that is not whole)"
    return f"the file is damaged ({kind}: {error})"


def _beginning(content: io.BufferedReader) -> bytes:
    return content.peek(_HEAD)[:_HEAD]


def _packed(head: bytes) -> tuple[str, Callable[[Any], Any]] | None:
    return next(((name, unpacks) for name, begins, unpacks in _PACKED if head.startswith(begins)), None)


def _form(path: Path, head: bytes, packed: list[str]) -> Form:
    for begins, form in _TABLES:
        if head.startswith(begins):
            return form
    where = f"{path} holds no records" + (f" in its {' in '.join(reversed(packed))}" if packed else "")
    for begins, kind, advice in _KINDS:
        if head.startswith(begins):
            raise InputError(f"{where}, it looks like {kind}: {advice}")
    if head[257:262] == b"ustar":
        raise InputError(f"{where}, it looks like a tar archive: {_UNPACK}")
    text = head.removeprefix(_BOM).lstrip()
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{where}, it looks like a web page: {_PAGE}")
    return "array" if text.startswith(b"[") else "lines"


def unpacked_size(path: Path) -> int:
    """About how many bytes a file has unpacked: what its first bytes become is taken for all of it."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            way = _packed(_beginning(file))  # type: ignore[arg-type]  # a BufferedReader is one
            if way is None:
                return size
            unpacked = len(way[1](file).read(BLOCK * 16))
            return int(size * unpacked / max(1, min(file.tell(), size)))
    except UNPACKING_ERRORS:
        return size
