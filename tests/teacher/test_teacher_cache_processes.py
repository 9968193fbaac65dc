"""The cache on disk among processes: one writer, many readers, kills, permissions and full disks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Forked
from tiny_cache import H, cache, filled, flip, hidden_of, only_shard, put_each, samples, shards

from pocl_fast.system.errors import InputError


def python(code, folder, wrap=()):
    """A process that runs `code` with `folder`, `many` (60 samples) and this file's names."""
    prelude = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}\n"
        "import resource\n"
        "from test_teacher_cache_processes import *\n"
        f"folder, many = Path({str(folder)!r}), samples(60)\n"
    )
    if not wrap:
        return Forked(prelude + code)
    command = [*wrap, sys.executable, "-c", prelude + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# -- processes ------------------------------------------------------------------------------------------------------


def test_a_writer_killed_at_any_time_leaves_whole_shards_only(tmp_path):
    write_all = (
        "one = cache(folder, shard_bytes=1)\n"
        "print('ready', flush=True)\n"
        "with one:\n"
        "    for sample in one.missing(many):\n"
        "        one.put([sample], hidden_of([sample]).repeat(1, 1))\n"
        "        time.sleep(0.002)\n"
    )
    done = []
    for attempt in range(4):
        process = python(write_all, tmp_path)
        process.stdout.readline()
        time.sleep(0.01 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        one = cache(tmp_path)
        there = [sample for sample in samples(60) if sample in one]
        assert torch.equal(one.read_hidden(there), hidden_of(there)) if there else True
        done.append(len(there))
    assert done == sorted(done)
    assert 0 < done[-1] < 60
    output_of(python(write_all, tmp_path))
    assert torch.equal(cache(tmp_path).read_hidden(samples(60)), hidden_of(samples(60)))


def test_a_half_written_shard_is_not_read_and_the_next_writer_clears_it_away(tmp_path):
    """Killed within the writing itself, by the limit on the size of a file."""
    die = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
        "one = cache(folder)\n"
        "one.put(many, hidden_of(many))\n"
        "one.flush()\n"
    )
    process = python(die, tmp_path)
    process.communicate()
    assert process.returncode == -signal.SIGXFSZ
    [half] = tmp_path.rglob("shard-*")
    assert ".partial-" in half.name
    assert half.stat().st_size == 40000
    assert cache(tmp_path).missing(samples(60)) == samples(60)
    filled(tmp_path, samples(60))
    assert not half.exists()


HOLD = (
    "one = cache(folder)\n"
    "one.put(many[:1], hidden_of(many[:1]))\n"
    "one.flush()\n"
    "print(os.getpid(), flush=True)\n"
    "time.sleep(60)\n"
)


def test_a_second_writer_is_told_of_the_first_readers_are_not_and_a_dead_writer_holds_nothing(tmp_path):
    first = python(HOLD, tmp_path)
    pid = int(first.stdout.readline())
    many = samples(60)
    try:
        one = cache(tmp_path)
        assert torch.equal(one.read_hidden(many[:1]), hidden_of(many[:1]))
        says = rf"another process \(process {pid} on .*\) is writing the teacher cache {one.folder}"
        with pytest.raises(InputError, match=says):
            one.put(many[1:2], hidden_of(many[1:2]))
        with pytest.raises(InputError, match=says + "; it lacks 59 of 60 samples: wait for it to end"):
            one.reserve(many)
        one.reserve(many[:1])  # nothing to write: no writer needed
    finally:
        first.kill()
        first.communicate()
    one.reserve(many)
    with one:
        one.put(many[1:], hidden_of(many[1:]))
    assert not cache(tmp_path).missing(many)


def test_readers_see_what_a_writer_adds_while_they_read(tmp_path):
    read = (
        "one = cache(folder)\n"
        "print('ready', flush=True)\n"
        "while one.missing(many):\n"
        "    time.sleep(0.01)\n"
        "print(torch.equal(one.read_hidden(many), hidden_of(many)))\n"
    )
    readers = [python(read, tmp_path) for _ in range(2)]
    for reader in readers:
        reader.stdout.readline()
    filled(tmp_path, samples(60), shard_bytes=4000)
    assert [output_of(reader) for reader in readers] == ["True\n"] * 2


def test_a_process_forked_off_does_not_keep_a_closed_cache_locked(tmp_path):
    one = cache(tmp_path)
    one.put(samples(6)[:1], hidden_of(samples(6)[:1]))
    if (child := os.fork()) == 0:  # as a data loader's worker
        time.sleep(60)
        os._exit(0)
    try:
        one.close()
        filled(tmp_path, samples(6))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_damaged_shard_is_not_deleted_once_another_writer_has_replaced_it(tmp_path):
    many = samples(6)
    filled(tmp_path, many)
    flip(only_shard(tmp_path), "keys")
    stale = cache(tmp_path)
    with cache(tmp_path) as deletes:
        deletes.reserve(many)
    filled(tmp_path, many)
    assert only_shard(tmp_path).name == "shard-000000.safetensors"
    stale.put(many[:1], hidden_of(many[:1]))
    assert torch.equal(stale.read_hidden(many), hidden_of(many))
    assert not cache(tmp_path).missing(many)


# -- space and permissions ------------------------------------------------------------------------------------------


def as_a_user_whom_permissions_bind():
    """What to run a process with: root passes every permission unless it gives up that capability."""
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def test_a_read_only_folder_is_read_and_says_what_it_lacks(tmp_path):
    one = filled(tmp_path / "cache", samples(60)[:50])
    one.folder.chmod(0o555)
    code = (
        "one = cache(folder)\n"
        "one.reserve(many[:50])\n"
        "with one:\n"
        "    print(torch.equal(one.read_hidden(many[:50]), hidden_of(many[:50])))\n"
        "try:\n"
        "    one.reserve(many)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    said = output_of(python(code, tmp_path / "cache", wrap=as_a_user_whom_permissions_bind()))
    assert said == f"True\nthe teacher cache {one.folder} is read-only; it lacks 10 of 60 samples\n"
    one.folder.chmod(0o755)
    (one.folder / ".lock").unlink()
    one.folder.chmod(0o555)
    said = output_of(python(code, tmp_path / "cache", wrap=as_a_user_whom_permissions_bind()))
    assert said == f"True\nthe teacher cache {one.folder} is read-only; it lacks 10 of 60 samples\n"
    one.folder.chmod(0o755)


def test_the_size_is_said_before_the_first_write_and_is_the_size(tmp_path, capsys):
    many = samples(60)
    one = cache(tmp_path)
    one.reserve(many)
    tokens = sum(len(sample.response_ids) for sample in many)
    said = capsys.readouterr().out
    need = tokens * 4 * H + 60 * 32
    assert f"teacher cache: {need / 1024:.1f} KiB for {tokens} supervised tokens of 60 samples (hidden-fp32); " in said
    assert "GiB free in" in said
    assert not shards(tmp_path)
    with one:
        one.put(many, hidden_of(many))
    assert need <= one.nbytes() <= need + 1024
    one.reserve(many)
    assert capsys.readouterr().out == ""


def test_too_little_space_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    many = samples(60)
    usage = type("Usage", (), {"free": 100 << 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"the teacher cache needs .* KiB for .*, and .* has 100.0 KiB free"):
        cache(tmp_path).reserve(many)
    usage.free = 1 << 20
    cache(tmp_path).reserve(many)


def test_a_disk_that_fills_is_one_clear_error_and_what_was_written_before_is_kept(tmp_path):
    """The limit on the size of a file stands in for the disk: a write fails in the middle of a shard."""
    code = (
        "one = cache(folder)\n"
        "one.put(many[:2], hidden_of(many[:2]))\n"
        "one.flush()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    with one:\n"
        "        one.put(many[2:], hidden_of(many[2:]))\n"
        "except InputError as error:\n"
        "    print(error, flush=True)\n"
        "print(sorted(path.name for path in one.folder.iterdir()))\n"
        "print(torch.equal(one.read_hidden(many), hidden_of(many)))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "one.flush()\n"
        "print(one.missing(many), cache(folder).missing(many))\n"
    )
    said = output_of(python(code, tmp_path)).splitlines()
    assert said[0].startswith("cannot write the teacher cache ")
    assert "shard-000001.safetensors: File too large. Free some space and run the command again" in said[0]
    assert said[1] == "['.lock', 'shard-000000.safetensors']"
    assert said[2:] == ["True", "[] []"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_really_full_disk_is_said_to_be_full(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no mounts here")
    try:
        one, many = cache(tmp_path, shard_bytes=1 << 15), samples(60)
        with pytest.raises(InputError, match=r"No space left on device. Free some space"):
            put_each(one, many)
        again = cache(tmp_path)
        there = [sample for sample in many if sample in again]
        assert 0 < len(there) < 60
        assert torch.equal(again.read_hidden(there), hidden_of(there))
        assert len(list(one.folder.iterdir())) == 2
        with pytest.raises(InputError, match="the teacher cache needs"):
            again.reserve(many)
        del one, again
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
