"""What `--train` and `--dev` name, and the records in it, read anew each time.

Knows which reader is for what. Does not know what a record says (samples.py).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.system.errors import InputError


class Source(Protocol):
    """Records on disk or on the hub."""

    @property
    def name(self) -> str:
        """How the user named it: it begins every message about it."""
        ...

    @property
    def unit(self) -> str:
        """What a record's number counts: "line", "row" or "record"."""
        ...

    def place(self, number: int) -> str:
        """Where the record of that number is, which `records` gave last: file, and line or row."""
        ...

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        """Each record with its number, from 1, without keeping them; what is wrong with it, in place of one that is
        none. `expected` says in errors what a record has."""
        ...

    def fingerprint(self) -> str:
        """Identifies the content."""
        ...

    def is_large(self) -> bool:
        """Whether the records are better not all in memory at once."""
        ...


def source_of(given: str | Path) -> Source:
    """The reader of what is named: a file, a folder, a split of a folder (FOLDER:SPLIT), several files by a pattern, a
    data set of the hub. Raises `InputError` where there is none, and for a name that is empty."""
    from pocl_fast.records import hub  # loads pyarrow, which records in memory do without

    name = str(given)
    if not name.strip():  # as a variable of a shell that is not set; a path of no text is the folder one is in
        raise InputError("records are to be read of a name that is empty: give a file, a folder, or hf:ORG/NAME:SPLIT")
    if name.startswith(hub.PREFIX):
        return hub.named(name)
    try:
        return _on_disk(name)
    except (OSError, RuntimeError) as error:  # a folder that may not be read, a user's home that is not there
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {name:.300}: {reason or error}") from error


def _on_disk(name: str) -> Source:
    from pocl_fast.records import saved
    from pocl_fast.records.files import File

    path = Path(name).expanduser()
    if path.is_dir():
        return saved.of_folder(path, name)
    if not path.exists() and not path.is_symlink():
        folder, _, split = name.rpartition(":")
        if folder and Path(folder).expanduser().is_dir():
            return saved.of_split(Path(folder).expanduser(), split, name)
        _refuse_part(name)
        if glob.has_magic(name):
            return _matching(name)
        raise InputError(f"cannot read {name}: No such file or directory{_elsewhere(name)}")
    return File(path, name)


def _refuse_part(name: str) -> None:
    """Raises `InputError` for a part in brackets, as test[:2], of what is on disk: it is no pattern of files."""
    found = re.fullmatch(r"(.+)(\[[\d%]*:[\d%-]*\])", name)
    if found is None:
        return
    whole, part = found.groups()
    folder, _, split = whole.rpartition(":")
    is_split = bool(folder) and Path(folder).expanduser().is_dir()
    if is_split or Path(whole).expanduser().exists():
        of = f'load_from_disk("{folder}")["{split}"].select(...)' if is_split else "the records that are meant"
        raise InputError(
            f"{name}: a part in brackets ({part}) can be taken of data sets of the hub alone; give {whole}, or save"
            f" {of} in a place of its own"
        )


def _elsewhere(name: str) -> str:
    """Where the records may be that a name of no file means."""
    from pocl_fast.records import hub, saved

    if re.match(r"[a-z][a-z0-9+.-]+://", name):
        return f"; files are read of this machine: download it first; of the hub give {hub.FORM}"
    path = Path(name)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not (saved.is_named_as_data(path) or path.parent.exists()):
        return f"; of the hub it is {hub.PREFIX}{name}:SPLIT"
    return ""


def _matching(name: str) -> Source:
    from pocl_fast.records import saved

    files = sorted(Path(found) for found in glob.glob(str(Path(name).expanduser()), recursive=True))
    if not files:
        raise InputError(f"{name} matches no file")
    return saved.as_one([file for file in files if file.is_file()], name, str(Path(name).parent))
