"""Teacher caches, samples for them, what a teacher could have said about these, and damage to shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.teacher.cache import TeacherCache
from pocl_fast.teacher.shards import HiddenEntries

H = 24
TEACHER = "a1" * 32
FP32 = HiddenEntries(H, torch.float32)


def samples(count: int = 6, vocab: int = 200, seed: int = 0) -> list[EncodedSample]:
    """Samples of 4 prompt tokens and 3, 4, 5 ... response tokens, all different."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    rows = [torch.randint(0, vocab, (4 + i % 40 + 3,), generator=generator).tolist() for i in range(count)]
    return [EncodedSample(i, tuple(row[:4]), tuple(row[4:]), False) for i, row in enumerate(rows)]


def hidden_of(many: list[EncodedSample], width: int = H) -> torch.Tensor:
    """[N, width] fp32, a function of each sample's tokens alone, the same in every process."""
    seeds = [torch.Generator().manual_seed(int.from_bytes(sample.fingerprint[:7], "little")) for sample in many]
    return torch.cat([torch.randn(len(s.response_ids), width, generator=g) for s, g in zip(many, seeds, strict=True)])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("shard-*.safetensors"))


def only_shard(folder: Path) -> Path:
    [shard] = shards(folder)
    return shard


def flip(shard: Path, tensor: str, byte: int = 0) -> None:
    """Changes one bit of a tensor in a shard, in a new file: the old one may be mapped."""
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    data[start + header[tensor]["data_offsets"][0] + byte] ^= 16
    shard.unlink()
    shard.write_bytes(data)


def cache(folder, entries=FP32, **options):
    return TeacherCache(folder, teacher=TEACHER, entries=entries, **options)


def filled(folder, many, entries=FP32, **options):
    """A cache of `hidden_of` the samples, put one by one and closed."""
    return put_each(cache(folder, entries, **options), many)


def put_each(one, many):
    with one:
        for sample in many:
            one.put([sample], hidden_of([sample]))
    return one
