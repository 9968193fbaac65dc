"""Without a GPU the Triton kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make tiny models 20x slower on a busy machine
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
from pairwise import covering, rows_of

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


LEFT_OUT = pytest.StashKey[dict[str, int]]()  # how much of what a run leaves to another
FAMILY_CELLS = "tests of model families"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="whole grids, slow tests, and kernels for every GPU")


def pytest_configure(config):
    config.stash[LEFT_OUT] = counts = {}
    if hasattr(config, "workeroutput"):  # of a process of pytest-xdist, which tells the first one
        config.workeroutput["left_out"] = counts


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    if "families" not in config.getoption("markexpr"):  # not `make test-families`
        others = [
            item for item in items if (mark := item.get_closest_marker("families")) and not mark.kwargs.get("always")
        ]
        leave_out(config, items, others, FAMILY_CELLS)
    if not config.getoption("full"):
        leave_out(config, items, [item for item in items if item.get_closest_marker("full")], "tests marked full")
        leave_out(config, items, beyond_pairs(items), "cases of grids whose pairs of values all run")


def leave_out(config, items, these, what):
    if these:
        config.stash[LEFT_OUT][what] = len(these)
        config.hook.pytest_deselected(items=these)
        items[:] = [item for item in items if item not in set(these)]


def beyond_pairs(items):
    """Of each grid marked `pairwise`, the cases that no pair of values needs."""
    grids = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            grids.setdefault((item.path, item.originalname), []).append(item)
    beyond = []
    for grid in grids.values():
        together = grid[0].get_closest_marker("pairwise").args
        kept = set(covering(rows_of(grid), together))
        beyond += [item for place, item in enumerate(grid) if place not in kept]
    return beyond


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    counts = node.config.stash[LEFT_OUT]
    for what, count in getattr(node, "workeroutput", {}).get("left_out", {}).items():
        counts[what] = max(count, counts.get(what, 0))  # each process collects them all


def pytest_terminal_summary(terminalreporter, config):
    counts = dict(config.stash[LEFT_OUT])
    if count := counts.pop(FAMILY_CELLS, 0):
        said = f"{count} {FAMILY_CELLS}"
        terminalreporter.write_line(f"left out here, and run by `make test-families` (pytest -m families): {said}")
    if counts:
        said = ", ".join(f"{count} {what}" for what, count in counts.items())
        terminalreporter.write_line(f"left out here, and run by `make test-all` (pytest --full): {said}")


@pytest.fixture(scope="session")
def full(pytestconfig):
    """Whether this run is one of `make test-all`."""
    return pytestconfig.getoption("full")


@pytest.fixture(scope="session")
def left_out(pytestconfig):
    """What a test leaves to `make test-all`, as the summary says it: a count of each kind."""
    return pytestconfig.stash[LEFT_OUT]


@pytest.fixture
def seed():
    """Fresh random numbers in every run; the seed is printed with a failing test, and POCL_TEST_SEED repeats it."""
    value = int(os.environ.get("POCL_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"POCL_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    from ranks import Ranks

    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def three_ranks(tmp_path_factory):
    from ranks import Ranks

    ranks = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A distilled tiny run, for tests to read and to copy: its inputs' folder, and its run directory."""
    from tiny_run import make_inputs, options, run

    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run("distill", output, *options(inputs)) == 0
    return inputs, output
