"""Sealed folders: whole or absent, and damage to any of their files is found and named."""

import pytest
from safetensors import SafetensorError

from pocl_fast.system.seal import SEAL, damage, disk_trouble, seal


def sealed(folder):
    partial = folder / "partial"
    (partial / "inner").mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(range(256)) * 20_000)  # more than is read at a time
    (partial / "inner" / "state").write_text("step 3")
    seal(partial, folder / "whole")
    return folder / "whole"


def test_a_sealed_folder_is_whole_and_takes_the_place_of_an_older_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "old").write_text("")
    folder = sealed(tmp_path)
    assert damage(folder) is None
    assert {path.name for path in folder.rglob("*")} == {"weights", "inner", "state", SEAL}
    assert not (tmp_path / "partial").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / SEAL).unlink(), f"it has no {SEAL}, so it was not written to the end"),
        (lambda folder: (folder / SEAL).write_text("{"), f"its {SEAL} cannot be read"),
        (lambda folder: (folder / "inner" / "state").unlink(), "its inner/state cannot be read (No such file"),
        (lambda folder: (folder / "inner" / "state").write_text("step"), "its inner/state has 4 of 6 bytes"),
        (lambda folder: flip_last(folder / "weights"), "its weights is not what was written (checksum)"),
    ],
    ids=["no seal", "broken seal", "missing", "cut", "flipped"],
)
def test_damage_is_named_with_its_file(tmp_path, change, says):
    folder = sealed(tmp_path)
    change(folder)
    assert damage(folder).startswith(says)


def flip_last(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_errors_of_a_full_disk_are_told_from_others():
    assert disk_trouble(OSError(28, "No space left on device")) == "No space left on device"
    assert disk_trouble(SafetensorError("I/O error: No space left")) == "I/O error: No space left"
    assert disk_trouble(RuntimeError("[enforce fail at inline_container.cc:672]")) == "torch could not write a file"
    assert disk_trouble(RuntimeError("shapes differ")) is None
    assert disk_trouble(SafetensorError("tensor not found")) is None
