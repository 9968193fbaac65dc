"""Folders as sources: what `datasets.save_to_disk` wrote, and folders of files.

Knows the files of these folders, and reads them without `datasets`. Does not know what a record says (samples.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pocl_fast.records import tables
from pocl_fast.records.files import Files, combined, is_large
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean

_STATE, _SPLITS = "state.json", "dataset_dict.json"
# what `datasets` takes for the names of splits in the names of files
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_DATA = re.compile(r"\.(parquet|jsonl|ndjson|json|arrow|feather)(\.(gz|zst|zstd|bz2|xz))?$", re.IGNORECASE)
_PACKED = re.compile(r"\.(gz|zst|zstd|bz2|xz)$", re.IGNORECASE)
_NO_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "metadata.json", "croissant.json"})
_KIND = {"ndjson": "jsonl", "feather": "arrow"}


class SavedDataset:
    """A folder of `Dataset.save_to_disk`."""

    unit = "row"

    def __init__(self, folder: Path, name: str) -> None:
        """Raises `InputError` where the folder does not say which files it has."""
        self.name, self._folder = name, folder
        state = _read_json(folder / _STATE)
        try:
            self._files = [folder / one["filename"] for one in state["_data_files"]]
            self._indices = [folder / one["filename"] for one in state.get("_indices_data_files") or ()]
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / _STATE} does not list the files of a data set: save it again") from error

    def place(self, number: int) -> str:
        return f"{self.name}, row {number}"

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Raises `InputError` for a file that is missing, cut off or damaged."""
        if self._indices:
            yield from tables.numbered(self._chosen(), self.name)
            return
        before = 0
        for file in self._files:
            number = 0
            for number, row in tables.arrow_rows(file, file):
                yield before + number, row
            before += number

    def _chosen(self) -> Iterator[pa.Table]:
        """The rows that an indices mapping names, as older versions of `datasets` wrote one, in its order."""
        table = pa.concat_tables(map(_mapped, self._files))
        for indices in map(_mapped, self._indices):
            for batch in indices.to_batches(max_chunksize=tables.PIECE_ROWS):
                yield table.take(batch.column(0))

    def fingerprint(self) -> str:
        return combined([*self._files, *self._indices])

    def is_large(self) -> bool:
        return is_large(sum(file.stat().st_size for file in self._files if file.is_file()))


def _mapped(file: Path) -> pa.Table:
    try:
        return pa.Table.from_batches(tables.arrow_batches(pa.memory_map(str(file)), file))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is an Arrow file that is missing, cut off or damaged ({error})") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): save the data set again") from error


def of_folder(folder: Path, name: str) -> SavedDataset | Files:
    """The records of a folder. Raises `InputError` for one of several splits or kinds of files, and for one that holds
    none."""
    if (folder / _STATE).is_file():
        return SavedDataset(folder, name)
    if (folder / _SPLITS).is_file():
        splits = splits_of(folder)
        raise InputError(
            f"{name} is a folder of several splits ({', '.join(splits)}): name one, as {name}:{splits[0]}"
            if splits
            else f"{name} is a DatasetDict without splits"
        )
    files = sorted(file for file in folder.iterdir() if _kind(file))
    if not files:
        raise InputError(_empty(folder, name))
    return as_one(files, name, name)


def of_split(folder: Path, split: str, name: str) -> SavedDataset:
    """A split of a folder of `DatasetDict.save_to_disk`. Raises `InputError` that names the splits where it has another
    ones."""
    if not (folder / _SPLITS).is_file():
        raise InputError(
            f"{name}: {folder} is no folder of splits: {_SPLITS}, which DatasetDict.save_to_disk writes, is missing"
        )
    splits = splits_of(folder)
    if split not in splits:
        raise InputError(no_split(name, split, splits))
    return SavedDataset(folder / split, name)


def no_split(name: str, split: str, splits: list[str]) -> str:
    """What is said of a split that is not there."""
    return f'{name}: there is no split "{split}"{did_you_mean(split, splits)}; there are {", ".join(splits)}'


def splits_of(folder: Path) -> list[str]:
    """The splits of a folder of `DatasetDict.save_to_disk`."""
    known = _read_json(folder / _SPLITS)
    return [str(split) for split in known.get("splits", ())] if isinstance(known, dict) else []


def as_one(files: list[Path], name: str, folder: str) -> Files:
    """Several files as one set. Raises `InputError` where they are of several splits, or of several kinds."""
    splits: dict[str, Path] = {}
    for file in files:
        if split := _split_of(file):
            splits.setdefault(split, file)
    if len(splits) > 1:
        shown = ", ".join(f"{file.name} ({split})" for split, file in splits.items())
        raise InputError(
            f"{name} has files of several splits: {shown}. Give one's files alone, as '{folder}/*train*' in quotes"
        )
    kinds = {_kind(file): file for file in files if _kind(file)}
    if len(kinds) > 1:
        shown = ", ".join(file.name for file in kinds.values())
        raise InputError(
            f"{name} has files of several kinds ({shown}), which may be the same records twice: give those of one kind,"
            f" as '{folder}/*.{next(iter(kinds))}' in quotes"
        )
    unpacked: dict[Path, Path] = {}
    for file in files:
        if (other := unpacked.setdefault(file.with_name(_PACKED.sub("", file.name)), file)) != file:
            raise InputError(
                f"{name} has both {other.name} and {file.name}, which may be the same records twice: leave one out"
            )
    return Files(files, name)


def is_named_as_data(file: Path) -> bool:
    """Whether a file's name is one of a file of records."""
    return _DATA.search(file.name) is not None


def _kind(file: Path) -> str:
    """The form that a file's name says it has; "" for names of other files."""
    found = _DATA.search(file.name)
    if found is None or file.name.startswith((".", "_")) or file.name in _NO_DATA or not file.is_file():
        return ""
    kind = found[1].lower()
    return _KIND.get(kind, kind)


def _split_of(file: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return next((split for split, names in _SPLIT_WORDS.items() if words.intersection(names)), None)


def _empty(folder: Path, name: str) -> str:
    within = sorted({file.parent for file in folder.rglob("*") if _kind(file)})[:3]
    wanted = "*.jsonl, *.json or *.parquet files, or what datasets.save_to_disk writes"
    if within:
        return f"{name} is a folder without {wanted}; give a folder that has them: {', '.join(map(str, within))}"
    return f"{name} is a folder without {wanted}"
