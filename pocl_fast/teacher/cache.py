"""A frozen teacher's outputs for each sample, kept on disk: computed once, read in any order and batch.

Knows keys, shards, space and locks. Does not know how a teacher computes its hidden states.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.system import console
from pocl_fast.system.errors import InputError
from pocl_fast.system.writer_lock import Writers, lock_folder, unlock
from pocl_fast.teacher.sample_index import SampleIndex, keys_of
from pocl_fast.teacher.shards import (
    KEY_BYTES,
    CacheShard,
    Columns,
    DamagedShard,
    Entries,
    HiddenEntries,
    TopK,
    TopKEntries,
    as_bytes,
    as_tensors,
    row_bytes,
    write_shard,
)

_INDEX_BYTES = KEY_BYTES + 16  # of a sample in a shard
_SHARD = re.compile(r"shard-\d+\.safetensors")


def bytes_needed(entries: Entries, samples: Sequence[EncodedSample]) -> int:
    """Bytes that different samples take on disk, but for the headers of their shards."""
    return sum(sample.supervised_count for sample in samples) * row_bytes(entries) + len(samples) * _INDEX_BYTES


class MissingSamples(InputError):
    """Samples that were asked for are not in the cache, or no longer: their shard is damaged."""


class TeacherCache:
    """A teacher's entries at supervised positions, by sample, in safetensors shards of one folder.

    A sample is found by the teacher's fingerprint and its own tokens (`EncodedSample.fingerprint`), so that a changed
    teacher, tokenizer, template or length limit never finds an old entry. A shard is complete or absent. One process
    writes at a time, or all ranks of one run; any number read; opening and reading write nothing. Used as a context
    manager it writes what is pending at the end of the block and releases the folder's lock.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: str,
        entries: Entries,
        shard_bytes: int = 1 << 25,
        writers: Writers = Writers(),  # noqa: B008 (immutable)
        say: Callable[[str], object] = console.say,
    ) -> None:
        """`teacher` identifies the teacher, `entries` is what is kept of a token; `shard_bytes` are collected in
        memory before a shard is written; `writers` are the ranks that may write together, and which of them this is;
        `say` gets a line for sizes (on rank 0) and for damages."""
        self.folder = Path(folder) / f"{teacher[:16]}-{entries.name}"
        self.entries = entries
        self._teacher, self._shard_bytes, self._writers, self._say = teacher, shard_bytes, writers, say
        self._shards: dict[int, CacheShard] = {}
        self._seen: set[tuple[str, int]] = set()  # names and times of the files seen so far
        self._looked_at = 0  # the folder's time then
        self._damaged: set[tuple[Path, int]] = set()  # to be deleted once this process is the writer, and their times
        self._index = SampleIndex()
        self._pending: dict[bytes, Columns] = {}
        self._pending_bytes = 0
        self._write_failed = False
        self._lock: IO[bytes] | None = None
        self.refresh()

    # -- reading ----------------------------------------------------------------------------------------------------

    def __contains__(self, sample: EncodedSample) -> bool:
        return not self._absent([sample])

    def missing(self, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        """Those of the samples that are not in the cache, each once; looks for shards that another process has written
        meanwhile. What other ranks have not written yet is missing."""
        absent = self._absent(samples)
        if absent and self._others_wrote():
            self.refresh()
            absent = self._absent(absent)
        return list({sample.fingerprint: sample for sample in absent}.values())

    def read_hidden(
        self,
        samples: Sequence[EncodedSample],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """[N, H] hidden states of the samples, in their order. Raises `MissingSamples`."""
        if not isinstance(self.entries, HiddenEntries):
            raise ValueError(f"a cache of {self.entries.name} holds no hidden states; use read_top_k")
        columns = as_tensors(self._read(samples), self.entries)
        return self.entries.decode({name: tensor.to(device) for name, tensor in columns.items()}, dtype)

    def read_top_k(self, samples: Sequence[EncodedSample], *, device: torch.device | str = "cpu") -> TopK:
        """[N, k] log-probabilities and tokens of the samples, in their order. Raises `MissingSamples`."""
        if not isinstance(self.entries, TopKEntries):
            raise ValueError(f"a cache of {self.entries.name} holds no top-k; use read_hidden")
        columns = as_tensors(self._read(samples), self.entries)
        return TopK(columns["log_probs"].to(device), columns["indices"].to(device))

    def verify(self, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        """Checks the checksum of each sample that this process has not read yet; returns the samples that are missing
        then."""
        places = self._index.find(keys_of(samples))
        for place in np.sort(places[places >= 0]).tolist():  # in the order of the files
            number, i = divmod(place, 1 << 32)
            if number in self._shards:
                try:
                    self._shards[number].verify(i)
                except DamagedShard as error:
                    self._drop(number, error)
        return self.missing(samples)

    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(shard.nbytes for shard in self._shards.values())

    def refresh(self) -> None:
        """Opens the shards that have come since the last look."""
        self._looked_at = _time(self.folder)
        try:
            with os.scandir(self.folder) as entries:
                found = {(e.name, _time(e)) for e in entries if _SHARD.fullmatch(e.name)}
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"cannot read the teacher cache {self.folder}: {error.strerror}") from error
        for name, changed in sorted(found - self._seen):
            if not changed:  # deleted since: it was damaged
                continue
            self._seen.add((name, changed))
            self._open(self.folder / name)

    # -- writing ----------------------------------------------------------------------------------------------------

    def reserve(self, samples: Sequence[EncodedSample]) -> None:
        """Reports the space that the missing samples will take, and becomes the writer if there are any.

        Raises `InputError` where that does not fit on the disk, the folder is read-only, or another process is writing.
        """
        missing = self.missing(samples)
        if not missing:
            return
        self._become_writer(f"; it lacks {len(missing)} of {len(samples)} samples")
        tokens = sum(sample.supervised_count for sample in missing)
        need = bytes_needed(self.entries, missing)
        free = shutil.disk_usage(self.folder).free
        what = f"{console.size(need)} for {tokens} supervised tokens of {len(missing)} samples ({self.entries.name})"
        if need > free:
            self.close()
            raise InputError(
                f"the teacher cache needs {what}, and {self.folder} has {console.size(free)} free: free some space,"
                " give another --output, or a smaller --cache-dtype"
            )
        if self._writers.rank == 0:
            self._say(f"teacher cache: {what}; {console.size(free)} free in {self.folder}")

    def put(self, samples: Sequence[EncodedSample], values: Tensor | TopK) -> None:
        """Adds the samples' entries: hidden states [N, H], or their `TopK`, in the order of the samples.

        Raises ValueError for shapes that do not fit, `InputError` for values that are not finite or where the folder
        cannot be written.
        """
        first = values if isinstance(values, Tensor) else values.log_probs
        counts = [sample.supervised_count for sample in samples]
        if len(first) != sum(counts):
            raise ValueError(f"{len(samples)} samples have {sum(counts)} supervised tokens, got {len(first)} rows")
        if not bool(torch.isfinite(first).all()):
            raise InputError("the teacher's values are not finite: look for damaged weights in it")
        self._become_writer()
        rows = as_bytes(self.entries.encode(values))  # type: ignore[arg-type]  # each says what it expected instead
        last = np.cumsum(counts)
        for sample, start, end in zip(samples, last - counts, last, strict=True):
            self._pending[sample.fingerprint] = {name: part[start:end] for name, part in rows.items()}
        self._pending_bytes += len(first) * row_bytes(self.entries)
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one shard. Raises `InputError` where the disk is full or fails; it stays pending
        then."""
        if not self._pending:
            return
        number = self._writers.next_number(max([-1, *(_number(Path(name)) for name, _ in self._seen)]))
        path = self.folder / f"shard-{number:06d}.safetensors"
        try:
            write_shard(path, self._teacher, self.entries, self._pending)
        except OSError as error:
            self._write_failed = True
            raise InputError(
                f"cannot write the teacher cache {path}: {error.strerror}."
                " Free some space and run the command again; what was written before is kept"
            ) from error
        self._pending = {}
        self._pending_bytes = 0
        self.refresh()

    def close(self) -> None:
        """Writes what is pending and releases the folder's lock."""
        try:
            if not self._write_failed:
                self.flush()
        finally:
            if self._lock is not None:
                unlock(self._lock)
                self._lock = None

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _others_wrote(self) -> bool:
        """Whether another process may have added a shard since the last look."""
        if self._lock is None:
            return True
        return self._writers.world_size > 1 and _time(self.folder) != self._looked_at  # a look costs more than this

    def _absent(self, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        outside = np.flatnonzero(self._index.find(keys_of(samples)) < 0).tolist()
        return [samples[i] for i in outside if samples[i].fingerprint not in self._pending]

    def _read(self, samples: Sequence[EncodedSample]) -> Columns:
        if absent := self._absent(samples):
            raise MissingSamples(f"{len(absent)} of {len(samples)} samples are not in the teacher cache {self.folder}")
        counts = [sample.supervised_count for sample in samples]
        out = {name: np.empty((sum(counts), c.row_bytes), np.uint8) for name, c in self.entries.columns.items()}
        at = 0
        for sample, count, place in zip(samples, counts, self._index.find(keys_of(samples)).tolist(), strict=True):
            if place < 0:
                for name, rows in self._pending[sample.fingerprint].items():
                    out[name][at : at + count] = rows
            else:
                number, i = divmod(place, 1 << 32)
                try:
                    self._shards[number].copy(i, out, at)
                except DamagedShard as error:
                    raise MissingSamples(self._drop(number, error)) from error
            at += count
        return out

    def _open(self, path: Path) -> None:
        number = _number(path)
        if self._shards.pop(number, None):  # another writer gave a damaged shard's number to a new one
            self._index.remove(number << 32, (number + 1) << 32)
        try:
            shard = CacheShard(path, self._teacher, self.entries)
        except DamagedShard as error:
            self._discard(path, f"{path} is damaged ({error}): its samples are computed again")
            return
        self._shards[number] = shard
        self._index.add(shard.keys, (number << 32) + np.arange(len(shard)))

    def _drop(self, number: int, error: DamagedShard) -> str:
        """Forgets a damaged shard. Returns the message about it."""
        shard = self._shards.pop(number)
        self._index.remove(number << 32, (number + 1) << 32)
        message = f"{shard.path} is damaged ({error}): its {len(shard)} samples are computed again"
        self._discard(shard.path, message)
        return message

    def _discard(self, path: Path, message: str) -> None:
        self._say(f"teacher cache: {message}")
        self._damaged |= {seen for seen in ((path, _time(path)),) if seen[1]}
        if self._lock is not None:
            self._delete_damaged()

    def _delete_damaged(self) -> None:
        for path, changed in self._damaged:
            if _time(path) == changed:  # else another writer has put a whole one in its place
                path.unlink(missing_ok=True)
        self._damaged.clear()

    def _become_writer(self, lacking: str = "") -> None:
        if self._lock is None:
            self._lock = lock_folder(
                self.folder,
                self._writers,
                what="teacher cache",
                when_alone=self._clear_partial_shards,
                lacking=lacking,
            )
            self._delete_damaged()
            self.refresh()  # what the last writer left since we looked

    def _clear_partial_shards(self) -> None:
        for partial in self.folder.glob("shard-*.partial-*"):  # of a writer that died
            partial.unlink(missing_ok=True)


def _number(shard: Path) -> int:
    return int(shard.stem.removeprefix("shard-"))


def _time(path: Path | os.DirEntry[str]) -> int:
    """When a file was changed, in ns; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
