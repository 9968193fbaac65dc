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
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


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
