"""Files told apart by their content."""

import hashlib

import pytest

from pocl_fast.system import fingerprint
from pocl_fast.system.errors import InputError
from pocl_fast.system.fingerprint import file_fingerprint


# empty; less than a block, one exactly, one and a byte, several
@pytest.mark.parametrize("size", [0, 9, 10, 11, 35])
def test_a_files_fingerprint_is_its_sha256(tmp_path, monkeypatch, size):
    monkeypatch.setattr(fingerprint, "BLOCK", 10)
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(content)
    assert file_fingerprint(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere: No such file or directory"):
        file_fingerprint(tmp_path / "nowhere")
