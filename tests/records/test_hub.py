"""Data sets of the hub: a hub on this machine, one that is out of reach, and a machine without `datasets`."""

import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_hub import hub_of

# reads each name that it is given, and prints the samples' texts, the last one's place and a fingerprint, or the error
READ = """
import json, sys
from pocl_fast.records.samples import read_samples
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError
for name in sys.argv[1:]:
    try:
        samples = read_samples(name)
        texts = [sample.messages[0]["content"] for sample in samples]
        print(json.dumps([texts, samples[-1].place, source_of(name).fingerprint()]))
    except InputError as error:
        print(json.dumps(str(error)))
"""
GOOD = '{"prompt": "q", "response": "a"}\n'
DAMAGED = {  # a line that is cut off; an array that is; two files that are not of one table; a kind not read here
    "lines/data/train.jsonl": GOOD * 2 + GOOD[:20],
    "array/train.json": f"[{GOOD}, {GOOD[:15]}",
    "mixed/a-train.jsonl": GOOD,
    "mixed/b-train.jsonl": '{"prompt": 3, "other": "a"}\n',
    "table/train.csv": "prompt,response\nq,a\nq,a,more\n",
}
TRAIN = [f"a{i}" for i in range(4)] + [f"b{i}" for i in range(4)]


def read(home, endpoint, *names, **environment):
    given = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | environment
    told = [sys.executable, "-c", READ, *names]
    done = subprocess.run(told, env=given, capture_output=True, text=True, check=True, timeout=100)
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": texts, "response": ["r"] * len(texts)}), path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What a hub gives, and what its cache gives then without the hub."""
    folder = tmp_path_factory.mktemp("hub")
    for part, texts in enumerate((TRAIN[:4], TRAIN[4:])):
        write(folder / f"org/one/data/train-{part:05}-of-00002.parquet", texts)
    write(folder / "org/one/data/test-00000-of-00001.parquet", ["t"])
    configs = ""
    for config in ("math", "code"):
        write(folder / f"org/two/{config}/train.parquet", [config])
        configs += f"- config_name: {config}\n  data_files: {config}/*.parquet\n"
    (folder / "org/two/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, content in DAMAGED.items():
        (folder / "org" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "org" / name).write_text(content)
    names = (
        "lines:train", "array:train", "mixed:train", "table:train", "two:math:", "one:train:", "one:[:3]",
        "one:train:[:3]", "one:train", "one:test", "one:train[:3]", "one:train[75%:]", "one@main:train",
        "two:math:train", "two:code:train", "one:trian", "one:validation[:3]", "one", "two", "two:train",
        "two:math", "two:maht:train", "nope:train", "one@x:train", "one:train[:x]", "one/one/one:train",
    )  # fmt: skip
    with hub_of(folder) as address:
        online = read(folder / "home", address, *(f"hf:org/{name}" for name in names))
    began = time.perf_counter()
    cached = read(folder / "home", "http://127.0.0.1:9", "hf:org/one:train", "hf:org/two:code:train", "hf:org/x:train")
    return online, cached, time.perf_counter() - began


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("one:train", TRAIN),
        ("one:test", ["t"]),
        ("one:train[:3]", TRAIN[:3]),
        ("one:train[75%:]", TRAIN[6:]),
        ("one@main:train", TRAIN),
        ("two:math:train", ["math"]),
        ("two:code:train", ["code"]),
    ],
)
def test_a_split_of_the_hub_is_read(hub, name, texts):
    found, place, _ = hub[0][f"hf:org/{name}"]
    assert (found, place) == (texts, f"row {len(texts)}")


def test_other_parts_have_other_fingerprints_and_the_same_part_the_same_without_the_hub(hub):
    online, cached, _ = hub
    names = ("one:train", "one:test", "one:train[:3]", "two:math:train", "two:code:train")
    assert len({online[f"hf:org/{name}"][2] for name in names}) == len(names)
    assert cached["hf:org/one:train"] == online["hf:org/one:train"]
    assert cached["hf:org/two:code:train"] == online["hf:org/two:code:train"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one:trian", 'there is no split "trian" (did you mean train?); there are train, test'),
        ("one:validation[:3]", 'there is no split "validation"; there are train, test'),
        ("one", "names no split; there are train, test"),
        ("two", "names no config; there are math, code"),
        ("two:train", "names no config; there are math, code"),
        ("two:math", "names no config; there are math, code"),
        ("two:maht:train", 'there is no config "maht" (did you mean math?); there are math, code'),
        ("nope:train", "the hub has no data set org/nope, or it is private"),
        ("one@x:train", "org/one has no revision x"),
        ("one:train[:x]", "datasets.load_dataset cannot read it ("),
        ("two:math:", 'names no split, for it has nothing behind "math:": give hf:ORG/NAME:SPLIT'),
        ("one:train:", 'names no split, for it has nothing behind "train:": give hf:ORG/NAME:SPLIT'),
        ("one:train:[:3]", 'names no split, for it has nothing behind "train:": give hf:ORG/NAME:SPLIT'),
        ("one:[:3]", "names no split, for it has nothing before its brackets: give hf:ORG/NAME:SPLIT"),
        ("one/one/one:train", "names no data set of the hub: give hf:ORG/NAME:SPLIT"),
    ],
)
def test_what_is_not_on_the_hub_is_one_error_that_names_what_is(hub, name, says):
    said = hub[0][f"hf:org/{name}"]
    assert said.startswith(f"hf:org/{name}")
    assert says in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lines:train", ": data/train.jsonl, line 3: not JSON ("),
        ("array:train", ": train.json, line 2: the file ends before the array does"),
        ("mixed:train", ": datasets.load_dataset cannot read it (DatasetGenerationError: "),
        ("mixed:train", "from CastError: Couldn't cast"),
        ("table:train", ": datasets.load_dataset cannot read it (DatasetGenerationError: "),
        ("table:train", "Expected 2 fields in line 3, saw 3"),
    ],
)
def test_a_damaged_file_on_the_hub_is_named_with_its_line_and_what_to_do(hub, name, says):
    said = hub[0][f"hf:org/{name}"]
    assert said.startswith(f"hf:org/{name}: ")
    assert says in said
    repository = name.partition(":")[0]
    assert f"`hf download org/{repository} --repo-type dataset --local-dir FOLDER`" in said
    assert said.endswith("put them right, and give their path")


def test_a_hub_out_of_reach_is_one_error_within_seconds(hub):
    _, cached, seconds = hub
    said = cached["hf:org/x:train"]
    assert "the hub (http://127.0.0.1:9) is out of reach" in said
    assert "is not in the cache" in said
    assert "--repo-type dataset --local-dir FOLDER" in said
    assert seconds < 20  # `datasets` alone takes 23 s for each


def test_without_the_library_the_command_to_install_it_is_said(tmp_path, monkeypatch):
    from pocl_fast.records.samples import read_samples
    from pocl_fast.system.errors import InputError

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'pocl-fast\[data\]'"):
        read_samples("hf:org/none:train")
