"""Damaged files and names that mean none: one error that says what to do, whatever the damage, and never fewer records
without a word."""

import bz2
import json
import lzma
import os
import random
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from tiny import arithmetic, write_jsonl

from pocl_fast.records.bad_records import BadRecords
from pocl_fast.records.samples import read_samples
from pocl_fast.system.errors import InputError


def refused(given, **options):
    with pytest.raises(InputError) as error:
        read_samples(given, **options)
    return str(error.value)


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_line_that_is_not_utf_8_is_a_bad_record_of_its_own(tmp_path):
    path, lines = tmp_path / "a.jsonl", lines_of(arithmetic(4)).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], '{"instruction": "é", "output": "x"}\n'.encode("latin1"), *lines[2:]]))
    assert refused(path).startswith(f"{path}, line 3, is not UTF-8 text (byte 0xe9): where it is Latin-1, `iconv")
    bad = BadRecords("skip")
    assert [sample.line for sample in read_samples(path, bad=bad)] == [1, 2, 4, 5]
    assert bad.counts == (("not UTF-8", (3,)),)


def test_the_line_is_said_of_a_pipe_as_well_which_is_read_once(tmp_path):
    read, write = os.pipe()
    os.write(write, lines_of(arithmetic(2)) + b'{"instruction": "\xff"}\n')
    os.close(write)
    assert "line 3, is not UTF-8 text (byte 0xff)" in refused(f"/dev/fd/{read}")
    os.close(read)


# -- compressed --------------------------------------------------------------------------------------------------------

PACKERS = pytest.mark.parametrize("pack", [bz2.compress, lzma.compress], ids=["bz2", "xz"])


@PACKERS
def test_a_damaged_stream_behind_a_whole_one_is_not_taken_for_the_end(tmp_path, pack):
    """pbzip2 and `cat` write several; Python's readers pass over all from one on whose first bytes are damaged."""
    path, parts = tmp_path / "a", [pack(lines_of(arithmetic(5, start=start))) for start in (0, 5, 10)]
    path.write_bytes(b"".join(parts))
    assert len(read_samples(path)) == 15
    path.write_bytes(parts[0] + bytes(64) + parts[1])
    assert len(read_samples(path)) == 10, "zeros pad streams"
    path.write_bytes(parts[0] + b"?" + parts[1][1:] + parts[2])
    assert "the file is damaged" in (said := refused(path))
    assert "after line 5: get the file again" in said


@PACKERS
def test_every_early_end_and_flipped_bit_is_noticed(tmp_path, pack):
    path, whole = tmp_path / "a", pack(lines_of(arithmetic(400)))
    chance = random.Random(0)
    for _ in range(15):
        place = chance.randrange(10, len(whole) - 1)
        path.write_bytes(whole[:place])
        assert "the file ends early" in refused(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        refused(path, bad=BadRecords("skip"))


def test_a_damaged_array_in_xz_is_an_error_too(tmp_path):
    """Its text may be no UTF-8 before its packing is seen to be damaged."""
    path, whole = tmp_path / "a", lzma.compress(json.dumps(arithmetic(400)).encode())
    chance = random.Random(1)
    for _ in range(15):
        place = chance.randrange(10, len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        refused(path)


# -- Arrow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_damaged_offset_of_an_arrow_file_is_an_error_and_does_not_end_the_process(tmp_path, kind):
    path, table = tmp_path / "a.arrow", pa.Table.from_pylist(arithmetic(50))
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)
    offsets = table.column("output").chunk(0).buffers()[1].to_pybytes()
    whole = path.read_bytes()
    assert whole.count(offsets) == 1
    for place, value in ((40, 1 << 30), (100, -5), (len(offsets) - 4, 1 << 29)):
        damaged = offsets[:place] + value.to_bytes(4, "little", signed=True) + offsets[place + 4 :]
        path.write_bytes(whole.replace(offsets, damaged))
        assert "is an Arrow file that is missing, cut off or damaged" in refused(path)


def test_a_damaged_file_of_a_saved_data_set_is_an_error(tmp_path):
    Dataset.from_list(arithmetic(50)).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    offsets = pa.array([one["output"] for one in arithmetic(50)]).buffers()[1].to_pybytes()[8:]
    assert offsets in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(offsets, (1 << 30).to_bytes(4, "little") * (len(offsets) // 4)))
    assert f"{file} is an Arrow file that is missing, cut off or damaged" in refused(tmp_path / "saved")


# -- names -------------------------------------------------------------------------------------------------------------


def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", arithmetic(3))
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        assert "a name that is empty" in refused(name)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/a.jsonl"], ids=["long", "user"])
def test_names_that_no_file_can_have_are_refused(name):
    assert refused(name).startswith(f"cannot read {name[:300]}")


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)  # root may read all
    assert refused(tmp_path / "a") == f"cannot read {tmp_path / 'a'}: Permission denied"


@pytest.mark.parametrize("name", ["https://a.org/b.jsonl", "s3://a/b", "nowhere/b.jsonl", "~/nowhere.jsonl"])
def test_the_hub_is_offered_for_its_names_alone(name):
    said = refused(name)
    assert f"hf:{name}" not in said
    assert ("download it first" in said) == ("://" in name)


@pytest.mark.parametrize("glob", ["", "/*"], ids=["folder", "pattern"])
def test_a_file_that_is_there_packed_too_is_not_read_twice(tmp_path, glob):
    write_jsonl(tmp_path / "a.jsonl", arithmetic(3))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress((tmp_path / "a.jsonl").read_bytes()))
    assert "has both a.jsonl and a.jsonl.bz2, which may be the same records twice" in refused(f"{tmp_path}{glob}")
    (tmp_path / "a.jsonl.bz2").rename(tmp_path / "b.jsonl.bz2")
    assert len(read_samples(f"{tmp_path}{glob}")) == 6


# -- what is said of forms that are none -------------------------------------------------------------------------------


def said_of(tmp_path, record):
    return refused(write_jsonl(tmp_path / "a.jsonl", [record]))


def test_a_field_with_another_meaning_is_not_offered_as_the_question(tmp_path):
    said = said_of(tmp_path, {"system_prompt": "s", "question": "q", "response": "a"})
    assert "did you mean" not in said
    assert "--fields prompt=FIELD" in said
    wild = {"conversation_hash": "x", "conversation": [{"role": "user", "content": "q"}]}
    assert '(did you mean conversations instead of "conversation"?)' in said_of(tmp_path, wild)


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, 'split "chosen" into "prompt" and "completion"'),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--fields response=chosen"),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}], "rejected": []}, "--fields messages=chosen"),
        ({"prompt": [{"role": "user", "content": "q"}], "chosen": [{}]}, "--fields completion=chosen"),
    ],
)
def test_the_advice_for_a_pair_of_preferences_can_be_followed(tmp_path, record, advice):
    assert advice in said_of(tmp_path, record)


def test_objects_around_all_records_are_told_how_to_become_lines(tmp_path):
    assert "`jq -c '.data[]' FILE`" in said_of(tmp_path, {"version": "1", "data": arithmetic(2)})
    columns = {"instruction": {"0": "a", "1": "b"}, "output": {"0": "c", "1": "d"}}
    assert "to_json(FILE, orient='records', lines=True)" in said_of(tmp_path, columns)
    assert len(said_of(tmp_path, {str(i): arithmetic(1)[0] for i in range(3000)})) < 1500


def test_tools_that_are_null_as_json_are_none(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "response": "a", "tools": "null"}])
    assert read_samples(path)[0].tools == ()
