"""What `--train` may name: each form, made by the library that people make it with, gives the samples of its JSONL."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_fast.records import files, tables
from pocl_fast.records.samples import iter_samples, read_samples, samples_from
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError


def record(i):
    """A conversation whose keys differ from record to record, at every depth."""
    arguments, kind = [({"a": i}, "a"), ({"b": "x"}, "b"), ({"c": [1, 2], "d": {"e": "é"}}, "c")][i % 3]
    call = {"type": "function", "function": {"name": f"f{i % 3}", "arguments": arguments}}
    schema = {"name": f"f{i % 3}", "parameters": {"type": "object", "properties": {kind: {"type": "string"}}}}
    messages = [
        *([{"role": "system", "content": "s"}] if i % 2 else []),
        {"role": "user", "content": f"é{i}\n😀"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7", "name": "f"},
        {"role": "assistant", "content": f"answer {i}", **({"reasoning_content": "r"} if i % 5 == 0 else {})},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": schema}]} | ({} if i % 4 else {"id": i})


RECORDS = [record(i) for i in range(23)]
LINES = "".join(json.dumps(one) + "\n" for one in RECORDS)


def same(given, records=RECORDS, unit=None):
    samples = read_samples(given) if not isinstance(given, list) else given
    want = samples_from(json.loads(json.dumps(records)), "records")
    plain = [replace(sample, line=0, unit="") for sample in samples]
    assert plain == [replace(sample, line=0, unit="") for sample in want]
    if unit is not None:
        assert [sample.place for sample in samples[:2]] == [f"{unit} 1", f"{unit} 2"]
    return True


def refused(given):
    with pytest.raises(InputError) as error:
        read_samples(given)
    return str(error.value)


def dataset(**how):
    return datasets.Dataset.from_list(RECORDS, **how)


@pytest.mark.parametrize("mixed", [None, "use_json"])
def test_what_datasets_writes_is_what_was_given_to_it(tmp_path, mixed):
    made = dataset(on_mixed_types=mixed)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    made.select(range(22, -1, -1)).save_to_disk(tmp_path / "reversed")  # it has an indices mapping
    assert same(tmp_path / "a.parquet", unit="row")
    assert same(tmp_path / "saved", unit="row")
    assert same(tmp_path / "reversed", RECORDS[::-1])


def test_datasets_in_memory_are_what_was_given_to_them():
    made = dataset()
    assert same(samples_from(made, "x"), unit="record")
    assert same(samples_from(made.select(range(22, -1, -1)), "x"), RECORDS[::-1])
    assert same(samples_from(made.to_iterable_dataset(), "x"))
    assert same(samples_from(made.with_transform(lambda batch: batch), "x"))


def test_what_pandas_writes_is_what_was_given_to_it(tmp_path):
    frame = pd.DataFrame(RECORDS)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.set_index(frame.index * 2).to_parquet(tmp_path / "index.parquet")  # which adds a column
    frame.to_feather(tmp_path / "a.feather")
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_json(tmp_path / "a.json.gz", orient="records")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.parquet", "index.parquet", "a.feather"):
        assert same(tmp_path / name, unit="row")
    assert same(tmp_path / "a.json", unit="record")
    assert same(tmp_path / "a.json.gz", unit="record")
    assert same(tmp_path / "a.jsonl", unit="line")


def test_records_with_numpy_in_them_are_as_without(tmp_path):
    plain = [{"messages": one["messages"][-4:-3] + one["messages"][-1:]} for one in RECORDS[1:4]]
    numpy = [{"messages": np.array(one["messages"], dtype=object), "system": float("nan")} for one in plain]
    assert same(samples_from(numpy, "x"), plain)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, lambda c: zstd(c)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_compressed_file_is_known_by_its_bytes(tmp_path, compress, times):
    (tmp_path / "a.jsonl").write_bytes(compress(LINES.encode()) * times)  # `cat` of compressed files is one
    assert same(tmp_path / "a.jsonl", RECORDS * times, unit="line")


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("command", ["gzip", "zstd"])
def test_what_the_command_line_compresses_is_read(tmp_path, command):
    (tmp_path / "a").write_text(LINES)
    dataset().to_parquet(tmp_path / "b")
    try:
        subprocess.run([command, "-q", tmp_path / "a", tmp_path / "b"], check=True)
    except FileNotFoundError:
        pytest.skip(f"{command} is not here")
    one, two = sorted(path for path in tmp_path.iterdir() if path.suffix)
    assert same(one, unit="line")
    assert same(two, unit="row")


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_a_compressed_file_that_ends_early_says_up_to_where_it_could_be_read(tmp_path, compress):
    path = tmp_path / "a.gz"
    lines = [json.dumps({"prompt": np.random.default_rng(i).bytes(300).hex(), "response": "b"}) for i in range(900)]
    packed = compress(("\n".join(lines) + "\n").encode())
    path.write_bytes(packed[: len(packed) * 3 // 4])
    said = refused(path)
    assert said.startswith(f"{path}: the file ends early (")
    reached = int(said.split("after line ")[1].split(":")[0])
    assert 400 < reached < 680
    path.write_bytes(packed[:-1])
    assert "after line 900" in refused(path) or "after line 8" in refused(path)
    path.write_bytes(packed[:9])
    assert "before its first record" in refused(path)


def test_a_damaged_compressed_file_is_called_so(tmp_path):
    path = tmp_path / "a.gz"
    packed = gzip.compress(LINES.encode())
    path.write_bytes(packed[:-6] + bytes(6))
    assert "the file is damaged (gzip: CRC check failed" in refused(path)
    path.write_bytes(packed + b"more")
    assert "after line 23" in refused(path)


def test_a_damaged_parquet_file_is_one_error_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"a{i}" for i in range(3 * 4096)], "response": ["b"] * 3 * 4096})
    pq.write_table(table, path, row_group_size=4096)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "is a Parquet file that is cut off or damaged" in refused(path)
    start = pq.read_metadata(pa.BufferReader(whole)).row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + bytes(2000) + whole[start + 2000 :])
    assert "it could be read up to row 4096 of 12288" in refused(path)


def test_a_saved_folder_that_is_not_whole_is_one_error(tmp_path):
    dataset().save_to_disk(tmp_path)
    [data] = tmp_path.glob("*.arrow")
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])  # the mark of the end alone
    assert "the mark of its end is missing" in refused(tmp_path)
    data.unlink()
    assert str(data) in refused(tmp_path)


def test_a_column_that_no_field_can_be_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [b"a"], "response": ["b"]}), path)
    assert refused(path).startswith(f'{path}, row 1: field "prompt" must be a string, got bytes; write the column as')
    pq.write_table(pa.table([pa.array(["a"])] * 2, names=["prompt", "prompt"]), path)
    assert 'has two columns of the name "prompt"' in refused(path)
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    pq.write_table(pa.table([text, pa.array(["b"])], names=["prompt", "response"]), path)
    assert 'rows 1 to 1: column "prompt" has text that is not UTF-8' in refused(path)


def test_a_file_without_records_is_called_so(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b""))
    for name in ("a.parquet", "a.gz"):
        assert "holds no sample" in refused(tmp_path / name)


TYPES = pa.struct([("a", pa.list_(pa.int8())), ("b", pa.struct([("c", pa.large_string())]))])


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["a", None, "é"]),
        pa.array(["a", None], pa.large_string()),
        pa.array(["a", None], pa.string_view()),
        pa.array(["a", "b", "a", None]).dictionary_encode(),
        pa.array([[["a"], []], None, [], [None, ["b", "c"]]]),
        pa.array([["a", "b"], None, ["c", "d"]], pa.list_(pa.string(), 2)),
        pa.array([{"a": [1], "b": {"c": "x"}}, {"a": [], "b": {"c": "y"}}], TYPES),
        pa.array([1, None]),
        pa.array([True, False]),
        pa.array([b"a", None]),
        pa.nulls(3),
        pa.array([], TYPES),
    ],
)
def test_values_are_those_of_to_pylist(array):
    assert tables.values(array) == array.to_pylist()
    assert tables.values(array[1:]) == array[1:].to_pylist()


def test_null_fields_of_structs_are_absent_and_maps_are_dicts():
    structs = pa.array([{"a": None, "b": {"c": None}}, None, {"a": [None, 1], "b": None}], TYPES)
    assert tables.values(structs) == [{"b": {}}, None, {"a": [None, 1]}]
    maps = pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))
    assert tables.values(maps) == [{"a": 1}, None]


def test_a_large_row_group_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE_BYTES", 1 << 16)
    seen = []
    whole = tables._rows
    monkeypatch.setattr(tables, "_rows", lambda piece, *rest: seen.append(piece.num_rows) or whole(piece, *rest))
    pq.write_table(pa.table({"prompt": [f"{i:0500}" for i in range(3000)], "response": ["b"] * 3000}), tmp_path / "a")
    assert sum(1 for _ in source_of(tmp_path / "a").records("")) == 3000
    assert max(seen) < 300


def test_what_a_table_holds_in_memory_decides_whether_it_is_large(tmp_path, monkeypatch):
    pq.write_table(pa.table({"prompt": [f"{i:0500}" for i in range(3000)]}), tmp_path / "a", compression="zstd")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * 1_500_000))
    monkeypatch.setattr(files, "LARGE", 1_000_000)
    for name in ("a", "a.gz"):
        assert (tmp_path / name).stat().st_size < 100_000
        assert source_of(tmp_path / name).is_large()


def test_the_indices_that_older_versions_of_datasets_saved_are_followed(tmp_path):
    dataset().save_to_disk(tmp_path)
    table = pa.table({"indices": pa.array([5, 3, 3, 22], pa.uint64())})
    with pa.OSFile(str(tmp_path / "indices.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    state = json.loads((tmp_path / "state.json").read_text())
    plain = source_of(tmp_path).fingerprint()
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert same(tmp_path, [RECORDS[i] for i in (5, 3, 3, 22)], unit="row")
    assert source_of(tmp_path).fingerprint() != plain


def test_a_split_is_named_by_colon_or_path(tmp_path):
    splits = datasets.DatasetDict({"train": dataset(), "test": dataset().select(range(3))})
    splits.save_to_disk(tmp_path / "d")
    assert same(f"{tmp_path}/d:train")
    assert same(f"{tmp_path}/d/test", RECORDS[:3])
    assert f"several splits (train, test): name one, as {tmp_path}/d:train" in refused(tmp_path / "d")
    assert 'there is no split "tran" (did you mean train?); there are train, test' in refused(f"{tmp_path}/d:tran")


def test_a_part_in_brackets_of_what_is_on_disk_is_refused_with_what_to_do(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(RECORDS[:3])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "t.jsonl").write_text(LINES)
    split, file = f"{tmp_path}/saved:test", f"{tmp_path}/t.jsonl"
    for whole, part in ((split, "[:2]"), (split, "[50%:]"), (file, "[:100]"), (f"{tmp_path}/saved/test", "[1:2]")):
        with pytest.raises(InputError) as error:
            source_of(whole + part)
        assert f"a part in brackets ({part}) can be taken of data sets of the hub alone; give {whole}, or" in str(
            error.value
        )
    with pytest.raises(InputError, match="matches no file"):
        source_of(f"{tmp_path}/none[:2]")


def test_a_folder_of_files_is_one_set_in_sorted_order(tmp_path):
    for start in (0, 10, 20):
        part = dataset().select(range(start, min(start + 10, 23)))
        part.to_parquet(tmp_path / f"train-{start // 10:05}-of-00003.parquet")
        with open(tmp_path / f"x{start}.jsonl", "w") as out:
            out.writelines(json.dumps(one) + "\n\n" for one in RECORDS[start : start + 10])
    assert same(f"{tmp_path}/*.parquet", unit="row")
    assert same(f"{tmp_path}/*.jsonl", unit="record")
    assert "files of several kinds" in refused(tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        path.rename(path.with_name("_" + path.name))  # which folders do not count
    (tmp_path / "README.md").write_text("a card")
    assert same(tmp_path, unit="row")
    (tmp_path / "test-00000-of-00001.parquet").write_bytes((tmp_path / "train-00000-of-00003.parquet").read_bytes())
    assert "files of several splits" in refused(tmp_path)


def test_an_error_within_a_folder_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "b.jsonl").write_text('\n{"prompt": "a"}\n')
    assert refused(tmp_path).startswith(f"{tmp_path}/b.jsonl, line 2: ")


def test_what_is_not_there_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("nope.jsonl") == "cannot read nope.jsonl: No such file or directory"
    assert refused("org/nope").endswith("of the hub it is hf:org/nope:SPLIT")
    assert refused("*.jsonl") == "*.jsonl matches no file"
    (tmp_path / "d/data").mkdir(parents=True)
    (tmp_path / "d/data/a.jsonl").write_text(LINES)
    assert refused("d").endswith("give a folder that has them: d/data")


def test_a_fingerprint_is_the_contents(tmp_path):
    def fingerprints():
        return [source_of(tmp_path / name).fingerprint() for name in ("a.parquet", "saved", "folder")]

    def write(made):
        made.to_parquet(tmp_path / "a.parquet")
        made.save_to_disk(tmp_path / "saved")
        made.to_json(tmp_path / "folder/a.jsonl")

    (tmp_path / "folder").mkdir()
    write(dataset())
    first = fingerprints()
    code = "import sys; from pocl_fast.records.sources import source_of; print(source_of(sys.argv[1]).fingerprint())"
    again = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == first[1]
    write(dataset().select(range(22)))
    assert not set(first) & set(fingerprints())


def test_messages_say_row_of_a_table(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["b", ""]}), tmp_path / "a")
    assert ", row 2: " in refused(tmp_path / "a")
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["b", "c"]}), tmp_path / "a")
    assert [sample.place for sample in iter_samples(source_of(tmp_path / "a"))] == ["row 1", "row 2"]
