"""The benchmarks' own samples and imports: what breaks when a module or a file of the package moves."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_what_a_script_imports_of_the_package_exists(script):
    """Within functions too, which `--help` does not reach."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pocl_fast":
            if node.module.startswith("pocl_fast.kernels"):
                pytest.importorskip("triton")
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


def test_rouge_has_the_bundled_samples_where_it_is_given_none(monkeypatch):
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    rouge = importlib.import_module("rouge")
    monkeypatch.delitem(sys.modules, "rouge")
    predictions, references = rouge.pairs(None, 5)
    assert len(set(references)) == 5
    assert all(references)
    assert all(a != b for a, b in zip(predictions, references, strict=True))
