"""What is shipped: the source archive holds all that a build, the tests and the demo need."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("csrc", "kernels", "pocl_fast", "tests", "benchmarks", "examples", "docs")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with what git knows")
def test_the_source_archive_holds_every_file_of_the_repository_that_a_build_or_a_test_needs(tmp_path):
    copy, known = tmp_path / "copy", subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True)
    files = [name for name in known.stdout.decode().splitlines() if (ROOT / name).exists()]
    for name in [*files, "MANIFEST.in"]:  # a copy, so that the repository gets no build folder
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {name for name in files if name.split("/")[0] in NEEDED and ".gitignore" not in name}
    wanted |= {
        "CMakeLists.txt",
        "Makefile",
        "setup.py",
        "pyproject.toml",
        "constraints-cpu.txt",
        "LICENSE",
        "README.md",
    }
    assert len(wanted) > 80
    assert wanted - held == set()


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("/nowhere/c++", "pocl-fast: CXX is /nowhere/c++, which is not there. Install g++ 10 or newer"),
        ("", "pocl-fast: no C++ compiler found. Install g++ 10 or newer"),
    ],
)
def test_a_build_without_a_compiler_says_so_before_anything_else(tmp_path, compiler, says):
    nothing = {**os.environ, "CXX": compiler, "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-t", str(tmp_path), "-b", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=nothing, capture_output=True, text=True)
    assert done.returncode != 0
    assert says in done.stderr
