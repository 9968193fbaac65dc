"""One teacher cache that several ranks write together, and what keeps a second run out of it."""

import os
import signal
import time

import pytest
import torch
from ranks import gloo
from test_teacher_cache_processes import output_of, python
from tiny import tiny_model
from tiny_cache import FP32, TEACHER, cache, filled, flip, hidden_of, only_shard, put_each, samples, shards
from tiny_teacher import lengths_of_calls, ready

from pocl_fast.data.packed import pack
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.system.writer_lock import Writers
from pocl_fast.teacher.cache import TeacherCache
from pocl_fast.teacher.teacher import Teacher


def of_rank(folder, rank, world_size=2, run="one", **options):
    return cache(folder, writers=Writers(rank, world_size, run), **options)


def numbers(folder):
    return [int(path.stem.removeprefix("shard-")) for path in shards(folder)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_numbers_of_ranks_never_meet_and_pass_what_is_there(world_size):
    for last in (-1, 0, 1, 6, 7):
        chosen = [Writers(rank, world_size).next_number(last) for rank in range(world_size)]
        assert sorted(chosen) == list(range(last + 1, last + 1 + world_size))
        assert [number % world_size for number in chosen] == list(range(world_size))


def test_ranks_write_at_the_same_time_and_read_each_others_shards_after_a_refresh(tmp_path):
    many = samples(12)
    both = [of_rank(tmp_path, rank, shard_bytes=1) for rank in range(2)]
    for i, sample in enumerate(many):
        both[i % 3 == 0].put([sample], hidden_of([sample]))  # unequal shares
    assert {number % 2 for number in numbers(tmp_path)} == {0, 1}
    assert len(numbers(tmp_path)) == 12
    for one in both:
        one.refresh()
        assert torch.equal(one.read_hidden(many[::-1]), hidden_of(many[::-1]))
        one.close()


def test_what_another_rank_has_flushed_is_not_missing_though_nobody_refreshes(tmp_path):
    many = samples(6)
    mine, other = of_rank(tmp_path, 0), of_rank(tmp_path, 1)
    mine.put(many[:1], hidden_of(many[:1]))
    other.put(many[1:], hidden_of(many[1:]))
    assert mine.missing(many) == many[1:]
    other.flush()
    assert mine.missing(many) == []


def test_asking_for_samples_that_are_not_there_reads_the_folder_only_once_it_has_changed(tmp_path, monkeypatch):
    many, looks = samples(60), []
    one = of_rank(tmp_path, 0)
    one.put(many[:1], hidden_of(many[:1]))
    monkeypatch.setattr(TeacherCache, "refresh", lambda self: looks.append(1))
    for sample in many[1:]:
        assert one.missing([sample]) == [sample]
    assert looks == []
    (one.folder / "shard-000007.safetensors.partial-1").touch()
    one.missing(many)
    assert looks == [1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_later_run_of_another_size_reads_everything_and_goes_on(tmp_path, world_size):
    many = samples(12)
    for rank in range(2):
        put_each(of_rank(tmp_path, rank, shard_bytes=1), many[rank:8:2])
    before = numbers(tmp_path)
    later = [of_rank(tmp_path, rank, world_size, "two", shard_bytes=1) for rank in range(world_size)]
    for i, sample in enumerate(many):
        if sample in later[i % world_size].missing(many):
            later[i % world_size].put([sample], hidden_of([sample]))
    for one in later:
        one.close()
    assert len(numbers(tmp_path)) == len(before) + 4
    assert torch.equal(cache(tmp_path).read_hidden(many), hidden_of(many))


@pytest.mark.parametrize("holder", [Writers(0, 1), Writers(0, 2, "one"), Writers(1, 2, "one")])
@pytest.mark.parametrize("comer", [Writers(0, 1), Writers(0, 2, "two"), Writers(1, 2, "two")])
def test_any_rank_of_a_second_run_is_refused_while_any_of_the_first_writes(tmp_path, monkeypatch, holder, comer):
    monkeypatch.setattr("pocl_fast.system.writer_lock._ATTEMPTS", 3)
    many = samples(6)
    first, second = cache(tmp_path, writers=holder), cache(tmp_path, writers=comer)
    first.put(many[:1], hidden_of(many[:1]))
    with pytest.raises(InputError, match=rf"another process \(process {os.getpid()} on .*\) is writing"):
        second.put(many[1:], hidden_of(many[1:]))
    first.close()
    second.close()
    with second:
        second.put(many[1:], hidden_of(many[1:]))
    assert not cache(tmp_path).missing(many)


def test_a_rank_that_joins_leaves_the_unfinished_shards_of_the_others_alone(tmp_path):
    many = samples(6)
    first = of_rank(tmp_path, 0)
    first.put(many[:1], hidden_of(many[:1]))
    partial = first.folder / "shard-000000.safetensors.partial-1"
    partial.write_bytes(b"being written")
    with of_rank(tmp_path, 1) as other:
        other.put(many[1:], hidden_of(many[1:]))
        assert partial.exists()
    first.close()
    with of_rank(tmp_path, 1, run="two") as other:
        other.reserve(samples(7))
    assert not partial.exists()


WRITE = (
    "from test_teacher_ranks import *\n"
    "one = of_rank(folder, {rank}, run='{run}', shard_bytes=1)\n"
    "print('ready', flush=True)\n"
    "with one:\n"
    "    for sample in many[{rank}::2]:\n"
    "        if one.missing([sample]):\n"
    "            one.put([sample], hidden_of([sample]))\n"
    "            time.sleep(0.005)\n"
)


def test_ranks_killed_at_any_time_leave_whole_shards_and_an_open_door(tmp_path):
    many = samples(60)
    for run in ("a", "b"):
        both = [python(WRITE.format(rank=rank, run=run), tmp_path) for rank in range(2)]
        for process in both:
            process.stdout.readline()
        time.sleep(0.05)
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        one = cache(tmp_path)
        there = [sample for sample in many if sample in one]
        assert torch.equal(one.read_hidden(there), hidden_of(there)) if there else True
    for process in [python(WRITE.format(rank=rank, run="c"), tmp_path) for rank in range(2)]:
        output_of(process)
    assert torch.equal(cache(tmp_path).read_hidden(many), hidden_of(many))
    assert len({number % 2 for number in numbers(tmp_path)}) == 2


# -- the teacher ----------------------------------------------------------------------------------------------------


def _fills(folder):
    model = ready(tiny_model())
    tokens = lengths_of_calls(model)
    teacher = Teacher(model, folder, cache_dtype=torch.float32)
    del tokens[:]
    teacher.fill(samples(40))
    computed = sum(tokens)
    logits = teacher.logits(samples(40))
    return computed, teacher.release_body_if_cached(samples(40)), logits


@gloo
def test_ranks_fill_a_cache_together_and_let_go_of_the_body_together(two_ranks, tmp_path):
    want = supervised_logits(ready(tiny_model()), pack(samples(40)), packed=True)
    (first, *_), (second, *_) = results = two_ranks(_fills, tmp_path)
    assert first + second == sum(map(len, samples(40)))  # each sample once
    assert abs(first - second) < 60  # tokens; the longest sample has 46
    for _, released, logits in results:
        assert released
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert len(shards(tmp_path)) == 2


def _trains(folder):
    """Two passes in which each rank sees other samples in the second than in the first."""
    model = ready(tiny_model())
    teacher = Teacher(model, folder)
    tokens = lengths_of_calls(model)
    mine, theirs = samples(12)[ranks.rank() :: 2], samples(12)[1 - ranks.rank() :: 2]
    with teacher.cache:
        teacher.output(mine)
        early = teacher.release_body_if_cached(samples(13))
        computed = sum(tokens)
        teacher.output(theirs)
        return early, sum(tokens) - computed, teacher.release_body_if_cached(samples(12))


@gloo
def test_what_one_rank_computed_in_a_pass_no_other_computes_in_the_next(two_ranks, tmp_path):
    assert two_ranks(_trains, tmp_path) == [(False, 0, True)] * 2


def _reads_damage(folder):
    said = []
    teacher = Teacher(ready(tiny_model()), folder, say=said.append)
    early = teacher.release_body_if_cached(samples(12))
    with teacher.cache:
        hidden = teacher.hidden(samples(12))
        return early, sum("is damaged" in line for line in said), teacher.release_body_if_cached(samples(12)), hidden


@gloo
def test_damage_that_one_rank_finds_keeps_the_body_of_all(two_ranks, tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    teacher.fill(samples(12))
    want = teacher.hidden(samples(12))
    flip(only_shard(tmp_path), "hidden")
    results = two_ranks(_reads_damage, tmp_path)
    assert [early for early, *_ in results] == [False, False]
    assert all(damages >= 1 for _, damages, *_ in results)
    assert [late for *_, late, _ in results] == [True, True]
    assert all(torch.equal(hidden, want) for *_, hidden in results)


def test_a_cache_of_one_process_is_read_by_ranks(tmp_path):
    filled(tmp_path, samples(6))
    one = TeacherCache(tmp_path, teacher=TEACHER, entries=FP32, writers=Writers(1, 2, "one"))
    assert torch.equal(one.read_hidden(samples(6)), hidden_of(samples(6)))
