"""Text and JSON files that are whole or as they were."""

import json

import pytest

from pocl_fast.system.files import write_json, write_text


def test_a_text_is_written_as_given_or_from_its_pieces(tmp_path):
    write_text(tmp_path / "a", "ü → 漢\n")
    write_text(tmp_path / "b", (piece for piece in ("ü → ", "漢\n")))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == "ü → 漢\n".encode()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    def pieces():
        yield "half"
        raise RuntimeError("power cut")

    write_text(tmp_path / "a", "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        write_text(tmp_path / "a", pieces())
    assert (tmp_path / "a").read_text() == "whole"


def test_json_comes_back_and_letters_stay_readable(tmp_path):
    write_json(tmp_path / "a.json", {"answer": "漢", "scores": [1.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"answer": "漢", "scores": [1.5, None]}
    assert "漢" in (tmp_path / "a.json").read_text(encoding="utf-8")
