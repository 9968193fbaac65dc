"""The cache on disk: what is read is what was written, or is said not to be."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import FP32, TEACHER, H, cache, filled, flip, hidden_of, only_shard, samples, shards

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.cache import MissingSamples, TeacherCache
from pocl_fast.teacher.sample_index import SampleIndex
from pocl_fast.teacher.shards import CacheShard, DamagedShard, HiddenEntries, TopK, TopKEntries, write_shard

# -- what is read ---------------------------------------------------------------------------------------------------


# One shard for all; a shard for every sample; several samples to a shard.
@pytest.mark.parametrize("shard_bytes", [1 << 25, 1, 4000])
def test_any_batch_in_any_order_is_what_was_written(tmp_path, shard_bytes):
    many = samples(60)
    one = filled(tmp_path, many, shard_bytes=shard_bytes)
    assert len(shards(tmp_path)) in {1 << 25: [1], 1: [60], 4000: range(10, 50)}[shard_bytes]
    order = random.Random(0)
    for reader in (one, cache(tmp_path)):
        for _ in range(10):
            batch = order.choices(many, k=7)  # some of them twice
            assert torch.equal(reader.read_hidden(batch), hidden_of(batch))


def test_what_is_pending_is_read_with_what_is_written(tmp_path):
    many = samples(6)
    one = cache(tmp_path)
    one.put(many[:4], hidden_of(many[:4]))
    one.flush()
    one.put(many[4:], hidden_of(many[4:]))
    assert torch.equal(one.read_hidden(many[::-1]), hidden_of(many[::-1]))
    assert cache(tmp_path).missing(many) == many[4:]


def test_bf16_and_int8_are_the_nearest_numbers_of_their_grid(tmp_path):
    many, hidden = samples(6), hidden_of(samples(6))
    hidden[3] = 0  # a row without a scale
    for entries in (HiddenEntries(H), HiddenEntries(H, torch.int8)):
        with cache(tmp_path, entries) as one:
            one.put(many, hidden)
    assert torch.equal(cache(tmp_path, HiddenEntries(H)).read_hidden(many), hidden.bfloat16().float())
    got = cache(tmp_path, HiddenEntries(H, torch.int8)).read_hidden(many)
    half_a_step = hidden.abs().amax(1, keepdim=True) / 127 / 2
    assert bool(((got - hidden).abs() <= half_a_step * 1.0001).all())
    assert not got[3].any()
    assert cache(tmp_path, HiddenEntries(H)).read_hidden(many, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_top_k_is_read_in_any_order_with_its_own_types(tmp_path):
    many, log_probs = samples(6), hidden_of(samples(6), 5)
    top = TopK(log_probs.double(), torch.arange(33 * 5).view(33, 5))
    with cache(tmp_path, TopKEntries(5)) as one:
        one.put(many, top)
    got = cache(tmp_path, TopKEntries(5)).read_top_k(many[::-1])
    counts = [len(sample.response_ids) for sample in many]
    assert torch.equal(got.log_probs, torch.cat(log_probs.split(counts)[::-1]))
    assert torch.equal(got.indices, torch.cat(top.indices.int().split(counts)[::-1]))
    assert got.indices.dtype == torch.int32
    with pytest.raises(ValueError, match="a cache of top5 holds no hidden states"):
        one.read_hidden(many)
    with pytest.raises(ValueError, match="a cache of hidden-fp32 holds no top-k"):
        cache(tmp_path).read_top_k(many)


def test_a_shard_is_plain_safetensors(tmp_path):
    many = samples(6)
    filled(tmp_path, many, HiddenEntries(H, torch.int8))
    tensors = load_file(only_shard(tmp_path))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "hidden": (torch.int8, [33, H]),
        "scale": (torch.float32, [33, 1]),
        "offsets": (torch.int64, [7]),
        "crc32": (torch.int64, [6]),
        "keys": (torch.uint8, [6, 16]),
    }
    torch.testing.assert_close(tensors["hidden"] * tensors["scale"], hidden_of(many), atol=0.02, rtol=0)


def test_the_key_is_of_the_tokens_and_of_where_the_response_starts():
    a = EncodedSample(0, (1, 2), (3, 4), False)
    assert a.fingerprint == EncodedSample(5, (1, 2), (3, 4), True).fingerprint
    for prompt, response in [((1, 2, 3), (4,)), ((1, 2), (3, 5)), ((1, 2), (3,)), ((2, 1), (3, 4)), ((1,), (2, 3, 4))]:
        assert EncodedSample(0, prompt, response, False).fingerprint != a.fingerprint


def test_other_teachers_and_other_entries_are_other_caches(tmp_path):
    many = samples(6)
    filled(tmp_path, many)
    assert TeacherCache(tmp_path, teacher="b2" * 32, entries=FP32).missing(many) == many
    assert cache(tmp_path, HiddenEntries(H)).missing(many) == many
    # the folder's name has the teacher's first 16 digits only: the shards have all
    assert TeacherCache(tmp_path, teacher=TEACHER[:16] + "0" * 48, entries=FP32).missing(many) == many


def test_values_that_do_not_fit_the_samples_are_refused(tmp_path):
    many = samples(6)
    one = cache(tmp_path)
    with pytest.raises(ValueError, match="6 samples have 33 supervised tokens, got 32 rows"):
        one.put(many, hidden_of(many)[1:])
    with pytest.raises(ValueError, match=r"expected hidden states \[N, 24\], got \[33, 23\]"):
        one.put(many, hidden_of(many)[:, 1:])
    with pytest.raises(InputError, match="not finite"):
        one.put(many, hidden_of(many).log())
    with pytest.raises(ValueError, match="float16"):
        HiddenEntries(H, torch.float16)
    with pytest.raises(ValueError, match=r"expected log_probs and indices \[N, 4\], got \[33, 5\]"):
        cache(tmp_path, TopKEntries(4)).put(many, TopK(hidden_of(many, 5), torch.zeros(33, 5)))
    with pytest.raises(MissingSamples, match="6 of 6 samples are not in the teacher cache"):
        one.read_hidden(many)


def test_two_hundred_thousand_samples_take_24_bytes_each_of_memory(tmp_path):
    entries, rows = (
        HiddenEntries(1, torch.int8),
        {"scale": np.zeros((1, 4), np.uint8), "hidden": np.ones((1, 1), np.uint8)},
    )
    one = cache(tmp_path, entries)
    one.folder.mkdir()
    count = 100_000
    for number in range(2):
        keys = [(number * count + i).to_bytes(16, "little") for i in range(count)]
        write_shard(one.folder / f"shard-{number:06d}.safetensors", TEACHER, entries, dict.fromkeys(keys, rows))
    tracemalloc.start()
    one.refresh()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 * count * (24 + 1) * 1.05  # a bit more: which samples were verified
    found = one._index.find(np.frombuffer(b"".join([keys[7], b"x" * 16, keys[-1]]), "S16"))
    assert found.tolist() == [(1 << 32) + 7, -1, (1 << 32) + count - 1]


def test_the_index_finds_what_a_dict_finds():
    generator, known, index = np.random.default_rng(0), {}, SampleIndex()
    for number in range(40):
        # few values, so that keys come again, and zero bytes, which numpy drops from the end of its strings
        keys = np.unique(generator.integers(0, 3, (generator.integers(1, 30), 16), dtype=np.uint8), axis=0)
        keys[:, 3:13] = 0
        keys = np.unique(keys.view("S16").ravel())
        keys = keys[[bytes(key.ljust(16, b"\0")) not in known for key in keys]]
        if number % 7 == 6:
            index.remove((number - 2) << 32, (number - 1) << 32)
            known = {key: place for key, place in known.items() if place >> 32 != number - 2}
        places = (number << 32) + np.arange(len(keys))
        index.add(keys, places)
        known |= {bytes(key.ljust(16, b"\0")): int(place) for key, place in zip(keys, places, strict=True)}
    assert len(known) > 100
    asked = [*known, *(bytes([i] * 16) for i in range(5, 50))]
    assert index.find(np.frombuffer(b"".join(asked), "S16")).tolist() == [known.get(key, -1) for key in asked]


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [HiddenEntries(3, torch.int8), TopKEntries(2)], ids=["int8", "top2"])
def test_a_flipped_bit_in_any_byte_of_a_shard_is_noticed_or_changes_nothing(tmp_path, entries):
    many = samples(4)
    values = hidden_of(many, 3)
    rows = TopK(values[:, :2], torch.arange(36).view(18, 2)) if isinstance(entries, TopKEntries) else values
    with cache(tmp_path, entries) as one:
        one.put(many, rows)
    path = only_shard(tmp_path)
    whole = path.read_bytes()
    want = one._read(many)
    noticed = 0
    for byte in range(len(whole)):
        data = bytearray(whole)
        data[byte] ^= 1 << byte % 8
        path.unlink()
        path.write_bytes(data)
        try:
            shard = CacheShard(path, TEACHER, entries)
            order = [shard.keys.tolist().index(sample.fingerprint.rstrip(b"\0")) for sample in many]
            got = {name: np.empty_like(part) for name, part in want.items()}
            for i, at in zip(order, [0, 3, 7, 12], strict=True):
                shard.copy(i, got, at)
        except DamagedShard:
            noticed += 1
            continue
        assert all(np.array_equal(got[name], want[name]) for name in want)
    assert noticed == len(whole)


def test_only_the_samples_of_a_damaged_shard_are_lost_and_the_shard_is_named(tmp_path, capsys):
    many = samples(12)
    filled(tmp_path, many, shard_bytes=700)
    paths = shards(tmp_path)
    kept = [sample for sample in many if sample.fingerprint not in CacheShard(paths[1], TEACHER, FP32).keys.tolist()]
    assert len(paths) > 3
    assert len(many) - 4 < len(kept) < len(many)
    flip(paths[1], "hidden", byte=13)
    one = cache(tmp_path)
    with pytest.raises(MissingSamples, match=f"{paths[1]} is damaged"):
        one.read_hidden(many)
    assert capsys.readouterr().out.count(f"{paths[1]} is damaged (a sample's rows do not match their checksum)") == 1
    assert torch.equal(one.read_hidden(kept), hidden_of(kept))
    lost = one.missing(many)
    assert [*kept, *lost] == sorted(many, key=lambda sample: (sample in lost, sample.index))
    with one:
        one.put(lost, hidden_of(lost))
    assert not paths[1].exists()
    assert torch.equal(cache(tmp_path).read_hidden(many), hidden_of(many))


@pytest.mark.parametrize("tensor", ["keys", "offsets", "crc32"])
def test_a_damaged_index_is_noticed_when_the_cache_is_opened(tmp_path, capsys, tensor):
    filled(tmp_path, samples(6))
    flip(only_shard(tmp_path), tensor, byte=9)
    assert cache(tmp_path).missing(samples(6)) == samples(6)
    assert (
        "is damaged (its index does not match its checksum): its samples are computed again" in capsys.readouterr().out
    )


def test_verification_finds_damage_in_what_was_not_read(tmp_path):
    many = samples(6)
    filled(tmp_path, many, shard_bytes=1)
    flip(shards(tmp_path)[2], "hidden")
    one = cache(tmp_path)
    one.read_hidden(many[:2])
    assert one.verify(many[:2]) == []
    assert one.verify(many) == [many[2]]


# Nothing, less than a header's length, a header cut off, all but the last byte, and one byte too many.
@pytest.mark.parametrize("length", [0, 5, 100, -1, 1 << 20])
def test_a_shard_of_another_length_is_damaged(tmp_path, capsys, length):
    filled(tmp_path, samples(6))
    path = only_shard(tmp_path)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:length] if length < 1 << 20 else whole + b"\0")
    assert cache(tmp_path).missing(samples(6)) == samples(6)
    assert f"{path} is damaged" in capsys.readouterr().out


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    filled(tmp_path, samples(3))
    folder = only_shard(tmp_path).parent
    (folder / "shard-mine.safetensors").write_bytes(b"mine")
    (folder / "notes").write_bytes(b"mine")
    one = filled(tmp_path, samples(6))
    assert not one.missing(samples(6))
    assert (folder / "shard-mine.safetensors").read_bytes() == (folder / "notes").read_bytes() == b"mine"
