"""The ranks of torchrun: shares, exchange, and that an error on one ends all."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from ranks import gloo

from pocl_fast.system import ranks


def test_without_torchrun_there_is_one_rank_which_has_all_the_work():
    ranks.start()
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (0, 1, True)
    assert ranks.share([1.0, 5.0, 2.0]) == [0, 1, 2]
    assert ranks.gather("a") == ["a"]
    assert ranks.from_first(lambda: 7) == 7
    ranks.barrier()
    ranks.stop()


def _who():
    return ranks.rank(), ranks.world_size(), ranks.is_first()


def _share(weights):
    return ranks.share(weights)


def _gathered():
    return ranks.gather({"rank": ranks.rank(), "data": torch.full((3 + ranks.rank() * 1000,), ranks.rank())})


WORKED = []


def _from_first():
    value = ranks.from_first(lambda: WORKED.append(1) or f"of rank {ranks.rank()}")
    return value, len(WORKED)


def _first_fails():
    def work():
        raise ValueError("no such thing")

    try:
        ranks.from_first(work)
    except Exception as error:
        return type(error).__name__, str(error)


@gloo
def test_ranks_know_themselves(three_ranks):
    assert three_ranks(_who) == [(0, 3, True), (1, 3, False), (2, 3, False)]


@gloo
def test_every_rank_has_every_value_of_any_size(three_ranks):
    for values in three_ranks(_gathered):
        assert [value["rank"] for value in values] == [0, 1, 2]
        assert [value["data"].tolist() for value in values] == [[0] * 3, [1] * 1003, [2] * 2003]


# none; fewer than ranks; one as heavy as all others; alike; falling, as batches of sorted prompts are
@pytest.mark.parametrize("weights", [[], [1.0], [9.0, *[1.0] * 9], [1.0] * 7, list(range(40, 0, -1))])
@gloo
def test_shares_are_balanced_and_hold_each_item_once(three_ranks, weights):
    shares = three_ranks(_share, weights)
    assert sorted(item for mine in shares for item in mine) == list(range(len(weights)))
    assert all(mine == sorted(mine) for mine in shares)
    loads = [sum(weights[item] for item in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(weights, default=0)


@gloo
def test_the_first_works_for_all(three_ranks):
    assert three_ranks(_from_first) == [("of rank 0", 1), ("of rank 0", 0), ("of rank 0", 0)]


@gloo
def test_where_the_first_fails_all_fail_with_its_message(three_ranks):
    assert three_ranks(_first_fails) == [
        ("ValueError", "no such thing"),
        ("OtherRankFailed", "rank 0 failed: ValueError: no such thing"),
        ("OtherRankFailed", "rank 0 failed: ValueError: no such thing"),
    ]


@gloo
def test_a_rank_that_is_killed_ends_the_waiting_of_the_others_at_once():
    code = """
        import os, signal, time
        from pocl_fast.system import ranks
        ranks.start()
        ranks.barrier()
        start = time.monotonic()
        if ranks.rank() == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            ranks.barrier()
        except ranks.OtherRankFailed as error:
            print(f"{error}|{time.monotonic() - start:.1f}")
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said, _ = processes[0].communicate(timeout=60)
    assert processes[1].wait(60) == -signal.SIGKILL
    message, seconds = said.strip().splitlines()[-1].split("|")  # Gloo of torch 2.9 prints lines of its own
    assert message == "rank 0 waited for another rank, which has ended"
    assert float(seconds) < 10
