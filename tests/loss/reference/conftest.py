"""Fresh random numbers in every test (`seed` in tests/conftest.py), and the backends that are held to the reference."""

from pathlib import Path

import pytest
import torch
from pairwise import rows_of

from pocl_fast import _C


@pytest.hookimpl(tryfirst=True)  # ahead of pytest's own choice by `-m`
def pytest_collection_modifyitems(config, items):
    """On a GPU machine what runs Triton kernels carries the `gpu` mark. Without a GPU they are interpreted, which takes
    a hundred times as long: of each large grid that is not cut to its pairs of values (tests/conftest.py) a third runs,
    in which every value and nearly every pair of values is still there."""
    if torch.cuda.is_available():
        for item in items:
            if _runs_triton(item):
                item.add_marker(pytest.mark.gpu)
        return
    grids = {}
    for item in items:
        if _takes_triton(item) and (config.getoption("full") or not item.get_closest_marker("pairwise")):
            grids.setdefault((item.path, item.originalname), []).append(item)
    left_out = set()
    for grid in grids.values():
        beyond = [item for item, row in zip(grid, rows_of(grid), strict=True) if sum(row.values()) % 3]
        left_out |= set(beyond if len(beyond) > 12 else [])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _takes_triton(item):
    return getattr(item, "callspec", None) is not None and item.callspec.params.get("backend") == "triton"


def _runs_triton(item):
    """By its backend, its fixture or, as in test_linear.py, its name; here, not elsewhere in tests/."""
    here = item.path.is_relative_to(Path(__file__).parent)
    return here and (
        _takes_triton(item) or "triton_device" in item.fixturenames or item.originalname.startswith("test_triton_")
    )


@pytest.fixture(autouse=True)
def fresh_numbers(seed):
    return seed


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton's kernels run: on a GPU, tensors are made there. Without one they are interpreted, and fp32 becomes
    bf16 by rounding, as hardware does it, where the interpreter cuts off."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        yield
        torch.set_default_device("cpu")
        return
    from triton.language import bfloat16
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar != bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view("uint16"), bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
    yield


@pytest.fixture(params=[*(f"cpp-{isa}" for isa in _C.supported_isas()), "triton"])
def backend(request, monkeypatch):
    """ "cpp" in every build that this processor can run, and "triton"."""
    name, _, isa = request.param.partition("-")
    if name == "triton":
        request.getfixturevalue("triton_device")
    else:
        monkeypatch.setenv("POCL_FAST_ISA", isa)
        assert _C.isa() == isa
    return name


@pytest.fixture
def small_tiles(request, monkeypatch):
    """Triton tiles of 128 logits, so that a short row has several."""
    if request.getfixturevalue("backend") == "triton":
        from pocl_fast.kernels import tiles

        monkeypatch.setattr(tiles, "choose_tile", lambda *_: tiles.Tile(32, 4, 1))
