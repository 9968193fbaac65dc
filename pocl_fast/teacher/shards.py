"""The files of a teacher cache: what is kept of a supervised token, and shards whose checksums show any damage.

A shard is a safetensors file: the columns of `HiddenEntries` or `TopKEntries`, N tokens long, and an index of its n
samples: `keys` [n, 16], `offsets` [n + 1] into the N rows, `crc32` [n] over each sample's rows. The index has a
checksum of its own in the metadata. Does not know teachers, locks or folders.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Columns = dict[str, np.ndarray]  # name -> [N, bytes of a row] uint8

FORMAT = "pocl-fast teacher cache 1"
KEY_BYTES = 16
HIDDEN_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}


class Column(NamedTuple):
    """One tensor of the entries: `width` numbers of `dtype` a token."""

    dtype: torch.dtype
    width: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class TopK(NamedTuple):
    """The k most likely tokens at N positions, most likely first; what their probabilities lack of 1 is the tail."""

    log_probs: Tensor  # [N, k] fp32, nats
    indices: Tensor  # [N, k] int32


@dataclass(frozen=True)
class HiddenEntries:
    """Final hidden states: bf16, fp32, or int8 with one fp32 scale a row (its largest magnitude / 127)."""

    hidden_size: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in HIDDEN_DTYPES.values():
            raise ValueError(f"hidden states are cached as bfloat16, float32 or int8, not {self.dtype}")

    @property
    def name(self) -> str:
        return "hidden-" + next(name for name, dtype in HIDDEN_DTYPES.items() if dtype == self.dtype)

    @property
    def columns(self) -> dict[str, Column]:
        scale = {"scale": Column(torch.float32, 1)} if self.dtype == torch.int8 else {}
        return scale | {"hidden": Column(self.dtype, self.hidden_size)}

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        """[N, H] of any float dtype -> the columns, on the same device. Raises ValueError for another width."""
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(f"expected hidden states [N, {self.hidden_size}], got {list(hidden.shape)}")
        if self.dtype != torch.int8:
            return {"hidden": hidden.to(self.dtype)}
        scale = hidden.float().abs().amax(1, keepdim=True) / 127
        return {"scale": scale, "hidden": (hidden / scale.where(scale > 0, 1.0)).round().to(torch.int8)}

    def decode(self, columns: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The columns -> [N, H] in `dtype`."""
        if self.dtype != torch.int8:
            return columns["hidden"].to(dtype)
        return (columns["hidden"] * columns["scale"]).to(dtype)


@dataclass(frozen=True)
class TopKEntries:
    """The k largest log-probabilities, in fp32 so that the tail keeps its digits, and their tokens; of the first
    `entries` of the vocabulary where that is given, normalised over these."""

    k: int
    entries: int | None = None

    @property
    def name(self) -> str:
        return f"top{self.k}" if self.entries is None else f"top{self.k}-of-{self.entries}"

    @property
    def columns(self) -> dict[str, Column]:
        return {"log_probs": Column(torch.float32, self.k), "indices": Column(torch.int32, self.k)}

    def encode(self, top: TopK) -> dict[str, Tensor]:
        """Raises ValueError unless both are [N, k]."""
        if top.log_probs.ndim != 2 or top.log_probs.shape[1] != self.k or top.indices.shape != top.log_probs.shape:
            shapes = list(top.log_probs.shape), list(top.indices.shape)
            raise ValueError(f"expected log_probs and indices [N, {self.k}], got {shapes[0]} and {shapes[1]}")
        return {"log_probs": top.log_probs.float(), "indices": top.indices.to(torch.int32)}


Entries = HiddenEntries | TopKEntries


def row_bytes(entries: Entries) -> int:
    """Bytes of a token's row in all columns."""
    return sum(column.row_bytes for column in entries.columns.values())


def as_bytes(tensors: Mapping[str, Tensor]) -> Columns:
    """Tensors [N, width] on any device -> their rows as bytes in main memory."""
    return {name: t.detach().cpu().contiguous().view(torch.uint8).numpy() for name, t in tensors.items()}


def as_tensors(rows: Columns, entries: Entries) -> dict[str, Tensor]:
    """The inverse of `as_bytes`, sharing memory."""
    return {name: torch.from_numpy(rows[name]).view(column.dtype) for name, column in entries.columns.items()}


def checksum(rows: Sequence[np.ndarray]) -> int:
    """CRC-32 of the bytes of a sample's rows, column by column."""
    crc = 0
    for part in rows:
        crc = zlib.crc32(part.data, crc)
    return crc


class DamagedShard(Exception):
    """A shard's bytes are not those that were written."""


def write_shard(path: Path, teacher: str, entries: Entries, samples: Mapping[bytes, Columns]) -> None:
    """Writes samples (key -> rows) under another name, then renames. Raises `OSError` where that fails, and leaves
    nothing.

    Not flushed to the device: a shard that a loss of power has cut off does not match its checksums.
    """
    counts = [len(next(iter(rows.values()))) for rows in samples.values()]
    index = {
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype("<i8"),
        "crc32": np.array([checksum([rows[name] for name in entries.columns]) for rows in samples.values()], "<i8"),
        "keys": np.frombuffer(b"".join(samples), np.uint8).reshape(-1, KEY_BYTES),
    }
    metadata = _metadata(teacher, entries, index)
    specification = _specification(entries, len(samples), int(index["offsets"][-1]))
    header = json.dumps({"__metadata__": metadata, **specification}).encode()
    header += b" " * (-len(header) % 8)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in specification:
                for part in [index[name]] if name in index else (rows[name] for rows in samples.values()):
                    file.write(np.ascontiguousarray(part).data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _specification(entries: Entries, n: int, N: int) -> dict[str, dict[str, object]]:
    """The header of a shard of n samples and N tokens: wider numbers first, so that each tensor is aligned."""
    tensors: list[tuple[str, str, list[int], int]] = [
        ("offsets", "I64", [n + 1], 8 * (n + 1)),
        ("crc32", "I64", [n], 8 * n),
    ]
    for name, column in sorted(entries.columns.items(), key=lambda item: -item[1].dtype.itemsize):
        tensors.append((name, _SAFETENSORS[column.dtype], [N, column.width], N * column.row_bytes))
    tensors.append(("keys", "U8", [n, KEY_BYTES], n * KEY_BYTES))
    specification: dict[str, dict[str, object]] = {}
    end = 0
    for name, dtype, shape, size in tensors:
        specification[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return specification


def _metadata(teacher: str, entries: Entries, index: Mapping[str, np.ndarray]) -> dict[str, str]:
    crc = checksum([np.ascontiguousarray(index[name]) for name in ("offsets", "crc32", "keys")])
    return {"format": FORMAT, "teacher": teacher, "entries": entries.name, "index_crc32": str(crc)}


class CacheShard:
    """A shard mapped into memory: its index checked when it is opened, the rows of a sample when first read."""

    def __init__(self, path: Path, teacher: str, entries: Entries) -> None:
        """Raises `DamagedShard` where it is not a whole shard of these entries of this teacher."""
        self.path = path
        try:
            size = path.stat().st_size
            # torch's mapping holds no file descriptor: a large cache has more shards than a process may open files
            self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            self._bytes.flags.writeable = False
            start = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
            if size < start:
                raise DamagedShard("it is cut off")
            header = json.loads(self._bytes[8:start].tobytes())
            n, N = header["keys"]["shape"][0], header[next(iter(entries.columns))]["shape"][0]
            metadata = header.pop("__metadata__")
            expected = _specification(entries, n, N)
            if header != expected or size != start + expected["keys"]["data_offsets"][1]:  # type: ignore[index]
                raise DamagedShard("its header does not fit its length or its entries")
            parts = {name: self._bytes[start:][slice(*spec["data_offsets"])] for name, spec in header.items()}
            self.offsets, self.crc32 = parts["offsets"].view("<i8"), parts["crc32"].view("<i8")
            self.keys = parts["keys"].view(f"S{KEY_BYTES}")
            index = {name: parts[name] for name in ("offsets", "crc32", "keys")}
            if metadata != _metadata(teacher, entries, index):
                raise DamagedShard("its index does not match its checksum")
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedShard(f"its header cannot be read ({error})") from error
        self.columns = {name: parts[name].reshape(N, c.row_bytes) for name, c in entries.columns.items()}
        self.verified = np.zeros(n, bool)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return self._bytes.nbytes

    def copy(self, i: int, out: Columns, at: int) -> None:
        """Copies the rows of sample i to `out`, from row `at`. Raises `DamagedShard`."""
        first, last = int(self.offsets[i]), int(self.offsets[i + 1])
        end = at + last - first
        for name, rows in self.columns.items():
            out[name][at:end] = rows[first:last]
        if not self.verified[i]:  # of the copy, which is in the processor's cache
            self._check(i, [out[name][at:end] for name in self.columns])

    def verify(self, i: int) -> None:
        """Reads sample i for its checksum unless that was done before. Raises `DamagedShard`."""
        if not self.verified[i]:
            first, last = int(self.offsets[i]), int(self.offsets[i + 1])
            self._check(i, [rows[first:last] for rows in self.columns.values()])

    def _check(self, i: int, rows: Sequence[np.ndarray]) -> None:
        if checksum(rows) != self.crc32[i]:
            raise DamagedShard("a sample's rows do not match their checksum")
        self.verified[i] = True
