"""The date that a chat template writes: one for all steps of a run, on whatever day they are done.

Knows the function `strftime_now` of transformers' templates. Does not know what else a template writes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text

ASKS_FOR_IT = "strftime_now"  # what a template calls for the date; transformers answers with the time of the call
DATE_FILE = "chat_template_date.txt"
_FLAGS = ("", "-", "_", "0", "^", "#")  # glibc's, between % and the letter


def today(tokenizer: Any) -> datetime:
    """The time that the tokenizer's chat template would be told now."""
    asked = "{{ " + ASKS_FOR_IT + "('%Y-%m-%dT%H:%M:%S') }}"
    turns = [{"role": "user", "content": "a"}]
    return datetime.fromisoformat(tokenizer.apply_chat_template(turns, chat_template=asked, tokenize=False))


def kept_date(folder: Path, tokenizer: Any, say: Callable[[str], object]) -> datetime:
    """The date in `folder`, or today's, which is then kept there; says which one it is. Every rank must call.

    Raises `InputError` where the file holds no date.
    """
    path = folder / DATE_FILE
    first = not ranks.from_first(path.exists)
    when = ranks.from_first(lambda: _read(path) if path.exists() else keep(folder, today(tokenizer)))
    kept = f"it is kept in {path} for all steps" if first else f"from {path}, where the first step kept it"
    say(f"the chat template writes the date: {when:%d %b %Y}; {kept}")
    return when


def keep(folder: Path, when: datetime) -> datetime:
    """Writes the date into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DATE_FILE, when.isoformat() + "\n")
    return when


def _read(path: Path) -> datetime:
    text = path.read_text(encoding="utf-8").strip()
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{path} holds no date but {text!r}: delete it to take today's") from error


def with_date(template: str, when: datetime) -> str:
    """The template with `strftime_now` answering that date.

    transformers takes no date, and gives a template no function of its caller. So a macro, which hides the function of
    this name, spells the date letter by letter. It is in the first line, so that lines are counted as before.
    """
    table = {
        f"%{flag}{letter}": when.strftime(f"%{flag}{letter}")
        for letter in string.ascii_letters + "%"
        for flag in _FLAGS
    }
    return _MACRO.replace("TABLE", json.dumps(table)) + template


_MACRO = (
    "{% macro strftime_now(format) %}{% set table = TABLE %}{% set said = namespace(asked='', text='') %}"
    "{% for letter in format %}{% if not said.asked and letter != '%' %}{% set said.text = said.text + letter %}"
    "{% else %}{% set said.asked = said.asked + letter %}{% if said.asked in table %}"
    "{% set said.text = said.text + table[said.asked] %}{% set said.asked = '' %}"
    "{% endif %}{% endif %}{% endfor %}{{ said.text }}{% endmacro +%}"
)
