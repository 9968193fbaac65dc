"""The objects of a JSON array, a piece of the file at a time.

Knows JSON text. Does not know what the objects mean (samples.py), nor how the file is packed (file_kinds.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pocl_fast.records import json_lines
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.system.errors import InputError

PIECE = 1 << 18  # characters that are read at a time
_SPACE = re.compile(r"[ \t\n\r\ufeff]*")
_UNFINISHED = 12  # characters: an escape such as \ud83d\ude00 that is cut in two is refused where it begins


class Objects:
    """Iterating gives the objects of a file whose first character is `[`; `line` is where the last one begins."""

    def __init__(self, path: Path, text: IO[str], expected: str) -> None:
        """`expected` says in errors what an object should be."""
        self.line = 1
        self._path, self._file, self._expected = path, text, expected
        self._text, self._at = "", 0  # what was read and is not parsed, and the place in it
        self._counted = 0  # up to where line ends of `_text` are in `line`
        self._ended = False

    def __iter__(self) -> Iterator[dict[str, Any] | BadRecord]:
        """What is no object is a `BadRecord` in its place. Raises `InputError` naming the line of JSON that is none,
        behind which nothing can be read, and of anything behind the array."""
        self._next("[")
        if self._peek() == "]":
            self._at += 1
        else:
            while True:
                if self._peek() == "]":
                    raise self._error("the array ends with a comma, behind which there is no object")
                value = self._value()
                if isinstance(value, dict):
                    yield value
                else:
                    said = self._error(f"expected a JSON object, got {type(value).__name__}")
                    yield BadRecord(str(said), "no object")
                if self._next(",]") == "]":
                    break
        if self._peek():
            raise self._error(
                "something follows the array. A file holds one array, or an object a line:"
                " `jq -c 'if type == \"array\" then .[] else . end' FILE` writes each object in a line of its own"
            )

    def _peek(self) -> str:
        """The next character that is no space; "" at the file's end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing too
            if self._at < len(self._text):
                self._count()
                return self._text[self._at]
            if not self._more():
                return ""

    def _next(self, wanted: str) -> str:
        found = self._peek()
        if not found:
            raise self._error("the file ends before the array does: it is cut off there")
        if found not in wanted:
            raise self._error(f"expected {' or '.join(wanted)} in the array, got {found!r}")
        self._at += 1
        return found

    def _value(self) -> Any:
        while True:
            try:
                value, self._at = json_lines.first_of(self._text, self._at)
                return value
            except (ValueError, RecursionError) as error:
                if self._may_go_on(error) and self._more(len(self._text)):
                    continue
                raise self._refused(error) from error

    def _may_go_on(self, error: Exception) -> bool:
        """Whether JSON was refused for having been read in part."""
        if self._ended or not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _UNFINISHED

    def _more(self, size: int = 0) -> bool:
        self._count()
        piece = self._file.read(max(PIECE, size))
        self._text, self._at, self._counted = self._text[self._at :] + piece, 0, 0
        self._ended = not piece
        return bool(piece)

    def _count(self) -> None:
        self.line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at

    def _refused(self, error: Exception) -> InputError:
        if not isinstance(error, json.JSONDecodeError):
            return self._error(json_lines.in_words(error))
        if self._ended and self._may_end(error):
            return self._error("the file ends before the array does: it is cut off, or a quote or bracket is missing")
        self.line += self._text.count("\n", self._counted, error.pos)
        return self._error(f"not JSON ({error.msg}, at {self._text[error.pos : error.pos + 20]!r})")

    def _may_end(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text.rstrip())

    def _error(self, why: str) -> InputError:
        return InputError(f"{self._path}, line {self.line}: {why}; expected an array of objects, {self._expected}")
