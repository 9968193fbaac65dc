"""Tables made in jobs by one process, by several, and by processes that were killed."""

import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forked
from ranks import gloo

from pocl_fast.system import ranks
from pocl_fast.system.resumable_table import Job, make_table

PIECES = [range(0, 7), range(7, 8), range(20, 33)]  # with a gap, as where samples were left out
INDEX = [i for piece in PIECES for i in piece]


def plan(piece):
    """Every third item of a piece together, so that no job is a range."""
    return [Job([i for i in piece if i % 3 == r], 1.0 + r) for r in range(3) if any(i % 3 == r for i in piece)]


def rows(items):
    return pa.table({"index": list(items), "square": [float(i * i) for i in items]})


JOBS = [set(job.items) for piece in PIECES for job in plan(piece)]


def made(folder, do=lambda items: None):
    """What a call makes: the table, its file's bytes, and the jobs that this process computed."""
    computed = []

    def work(items):
        do(items)
        computed.append(set(items))
        return rows(items)

    make_table(iter(PIECES), plan, work, folder / "t.parquet")
    return pq.read_table(folder / "t.parquet"), (folder / "t.parquet").read_bytes(), computed


def test_the_table_holds_the_rows_of_every_item_in_order(tmp_path):
    table, _, computed = made(tmp_path)
    assert table["index"].to_pylist() == INDEX
    assert table["square"].to_pylist() == [float(i * i) for i in INDEX]
    assert computed == JOBS
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_table_that_is_there_is_kept_and_what_is_left_of_its_parts_goes(tmp_path):
    _, before, _ = made(tmp_path)
    (tmp_path / "t.parts" / "000000").mkdir(parents=True)  # killed while they were deleted
    assert made(tmp_path)[1:] == (before, [])
    assert not (tmp_path / "t.parts").exists()


@pytest.mark.parametrize("at", range(len(JOBS)))
def test_after_an_error_in_any_job_only_the_rest_is_computed(tmp_path, at):
    def fail(items):
        if set(items) == JOBS[at]:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        made(tmp_path, fail)
    _, content, computed = made(tmp_path)
    assert computed == JOBS[at:]
    (tmp_path / "whole").mkdir()
    assert made(tmp_path / "whole")[1] == content


def test_a_part_that_a_power_cut_damaged_is_computed_again(tmp_path):
    with pytest.raises(RuntimeError):
        made(tmp_path, lambda items: power_cut() if set(items) == JOBS[4] else None)
    part = tmp_path / "t.parts" / "000000" / "000001.parquet"
    part.write_bytes(part.read_bytes()[:-3])
    table, _, computed = made(tmp_path)
    assert computed == [JOBS[1], *JOBS[4:]]
    assert table["index"].to_pylist() == INDEX


def power_cut():
    raise RuntimeError("power cut")


def test_no_items_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no items"):
        make_table([], plan, rows, tmp_path / "t.parquet")


KILLED = """
import os, resource, signal, sys
sys.path[:0] = {tests!r}
from test_resumable_table import *
from pocl_fast.system import resumable_table

count, write = 0, resumable_table.pq.write_table

def killed_in_its_job(items):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)

def killed_in_writing(*arguments):
    global count
    count += 1
    if count == {at}:  # the kernel kills the process once the file has 300 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    write(*arguments)

if {where!r} == "job":
    made(Path({folder!r}), killed_in_its_job)
else:
    resumable_table.pq.write_table = killed_in_writing
    made(Path({folder!r}))
"""


# in the middle of computing a job, and of writing its part: the first, one within a piece, the last
@pytest.mark.parametrize("where", ["job", "part"])
@pytest.mark.parametrize("at", [1, 3, len(JOBS)])
def test_a_process_that_is_killed_leaves_what_another_ends_to_the_same_table(tmp_path, where, at):
    here = Path(__file__).parent
    code = KILLED.format(tests=[str(here), str(here.parent)], at=at, where=where, folder=str(tmp_path))
    status = Forked(code).wait(60)
    assert status == -(signal.SIGKILL if where == "job" else signal.SIGXFSZ)
    if where == "part":
        (partial,) = tmp_path.rglob("*.partial")
        assert partial.stat().st_size == 300
    _, content, computed = made(tmp_path)
    assert computed == JOBS[at - 1 :]
    (tmp_path / "whole").mkdir()
    assert made(tmp_path / "whole")[1] == content


def _made(folder):
    return made(folder)[1:]


@gloo
def test_ranks_share_the_jobs_and_make_the_table_of_one_process(three_ranks, tmp_path):
    results = three_ranks(_made, tmp_path)
    computed = [job for _, jobs in results for job in jobs]
    assert sorted(map(sorted, computed)) == sorted(map(sorted, JOBS))
    assert all(jobs for _, jobs in results)
    (tmp_path / "whole").mkdir()
    assert {content for content, _ in results} == {made(tmp_path / "whole")[1]}
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "whole"}


@gloo
def test_another_number_of_ranks_goes_on_with_the_parts(two_ranks, tmp_path):
    with pytest.raises(RuntimeError):
        made(tmp_path, lambda items: power_cut() if set(items) == JOBS[3] else None)
    computed = [job for _, jobs in two_ranks(_made, tmp_path) for job in jobs]
    assert sorted(map(sorted, computed)) == sorted(map(sorted, JOBS[3:]))
    (tmp_path / "whole").mkdir()
    assert (tmp_path / "t.parquet").read_bytes() == made(tmp_path / "whole")[1]


def _in_a_folder_of_its_own(folder):
    try:
        made(folder / str(ranks.rank()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@gloo
def test_ranks_that_do_not_see_one_folder_are_told_so(two_ranks, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    first, second = two_ranks(_in_a_folder_of_its_own, tmp_path)
    assert first.startswith(f"InputError: {tmp_path / '0' / 't.parts'}")
    assert first.endswith("was written by another rank and is not here: --output must be one folder")
    assert second.startswith("OtherRankFailed: rank 0 failed: InputError: ")
    assert not (tmp_path / "0" / "t.parquet").exists()
