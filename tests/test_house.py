"""The package keeps the shape that docs/architecture.md draws: short modules, short functions, rooms named in words.

That imports point one way is checked by `make lint` (import-linter, the contracts in pyproject.toml).
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pocl_fast"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts)
ROOMS = sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists() and path.name != "kernels")


def test_a_module_has_at_most_400_lines():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert len(lengths) > 70
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_a_function_has_at_most_60_lines():
    long = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long[f"{path.relative_to(PACKAGE)}: {node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_opens_with_what_it_knows_and_does_nothing(room):
    """Its `__init__.py` is a docstring alone, so that importing one module of a room loads no other."""
    [only] = ast.parse((room / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert len(only.value.value.split()) > 8


def test_a_room_has_at_most_fifteen_modules():
    assert len(ROOMS) >= 9
    counts = {room.name: len(list(room.glob("*.py"))) - 1 for room in ROOMS}
    assert {name: count for name, count in counts.items() if count > 15} == {}
