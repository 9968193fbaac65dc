"""Values as records have them: text, null, lists, and JSON within text; and what is said of those that are none.

Does not know fields (forms.py) nor turns (messages.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pocl_fast.records import json_lines
from pocl_fast.records.bad_records import BadRecord

MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})  # half of the question, and no text
_MEDIA = {"image": "an image", "audio": "audio", "video": "a video"}  # part of a name -> what it is


def text_of(value: Any, where: str, field: str, item: int | None = None) -> str:
    """A value that must be text with something in it. Raises `BadRecord` that names `where` and the field, or its
    item."""
    if not isinstance(value, str):
        as_text = f'; write it as text: "{value}"' if isinstance(value, (int, float)) else ""
        if isinstance(value, bytes):  # of a table's column
            as_text = "; write the column as text (`pyarrow.compute.cast(column, 'string')`)"
        if isinstance(value, Mapping) and "0" in value:  # a column, as pandas writes it by itself
            as_text = "; of pandas, write records: `DataFrame.to_json(FILE, orient='records', lines=True)`"
        raise BadRecord(f"{_place(where, field, item)} must be a string, got {kind_of(value)}{as_text}", "not text")
    if not value or value.isspace():
        raise BadRecord(f"{_place(where, field, item)} is empty: give it text, or leave it out", "empty text")
    if not value.isascii():
        check_encodable(value, _place(where, field, item))
    return value


def _place(where: str, field: str, item: int | None) -> str:
    return f'{where}: field "{field}"' + ("" if item is None else f", item {item}")


def check_encodable(value: Any, place: str) -> None:
    """Raises `BadRecord` where text, or text within a value, has half of a surrogate pair, which no tokenizer has."""
    if isinstance(value, str) and value.isascii():
        return
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        raise BadRecord(f"{place} cannot be written as JSON ({error})", "not JSON") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{place} has half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character: leave it"
            " out, or write \\ufffd in its place",
            "half a character",
        ) from error


def from_json(text: str, place: str) -> Any:
    """The value of JSON text. Raises `BadRecord` for other text."""
    try:
        return json_lines.decoded(text)
    except (ValueError, RecursionError) as error:
        kind = json_lines.DEEP if isinstance(error, RecursionError) else "not JSON"
        reason = json_lines.in_words(error)
        raise BadRecord(f"{place} is text that is not JSON ({reason}): {text!r:.60}", kind) from error


def without_nulls(value: Any) -> Any:
    """The value without fields that are null, at every depth."""
    value = listed(value)
    if isinstance(value, Mapping):
        return {field: without_nulls(one) for field, one in value.items() if not is_absent(one)}
    return [without_nulls(one) for one in value] if is_list(value) else value


def is_absent(value: Any) -> bool:
    """Whether a field's value says that there is none: null, or the NaN, NA or NaT that pandas writes in its place."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    pandas = sys.modules.get("pandas")  # not imported for this: who has its values has it
    return pandas is not None and (value is pandas.NA or value is pandas.NaT)


def says_nothing(value: Any) -> bool:
    """Whether a value is an empty text, list or object."""
    return isinstance(value, (str, list, tuple, dict)) and not value


def is_list(value: Any) -> bool:
    """Whether a value is a list as records have them."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def listed(value: Any) -> Any:
    """A NumPy array, which pandas makes of a list in a column, as a list, and a NumPy number as Python's; any other
    value as it is."""
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def kind_of(value: Any) -> str:
    """The type of a value, for a message."""
    return "null" if is_absent(value) else type(value).__name__


def medium(name: Any) -> str:
    """What a field or a part of this name holds besides text, in words; empty where it may be text."""
    return next((words for one, words in _MEDIA.items() if one in str(name).lower()), "")
