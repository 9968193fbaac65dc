"""What holds records, and what is said of what does not."""

from collections import UserDict

import pytest
from tiny import arithmetic

from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError


class ByIndex:
    """A torch Dataset: it has no end when it is iterated by numbers."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place % len(self.rows)]


class Table:
    """What iterates over its columns, as a DataFrame does."""

    columns = ("prompt", "response")

    def __iter__(self):
        return iter(self.columns)


class Frame(Table):
    def to_dict(self, kind):
        raise NotImplementedError


class ArrowTable(Table):
    def to_pylist(self):
        raise NotImplementedError


def references(data):
    return [sample.references[0] for sample in samples_from(data, "data")]


@pytest.mark.parametrize(
    "hold",
    [list, tuple, iter, ByIndex, lambda rows: (row for row in rows), lambda rows: [UserDict(row) for row in rows]],
)
def test_records_are_taken_out_of_whatever_gives_dicts(hold):
    assert references(hold(arithmetic(3))) == ["0", "1 1", "2 2 2"]


def test_a_dataset_is_read_and_a_dict_of_them_says_what_to_give():
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "response": "b", "instruction": None}, {"prompt": "c", "output": None}]
    rows[1] |= {"response": "d", "instruction": None}
    dataset = datasets.Dataset.from_list(rows)
    assert references(dataset) == references(dataset.to_iterable_dataset()) == ["b", "d"]
    with pytest.raises(
        InputError, match=r"data is a dict of several sets \(train\): give one of them, as data\['train"
    ):
        references(datasets.DatasetDict({"train": dataset}))


def test_a_data_frame_says_what_to_give():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"prompt": "a", "response": "b", "input": None}, {"prompt": "c", "response": "d"}])
    with pytest.raises(InputError, match=r'data is a DataFrame, .*: give data\.to_dict\("records"\)'):
        references(frame)
    assert references(frame.to_dict("records")) == ["b", "d"]  # with NaN for what is missing


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}, r"several sets \(train, test\): give one of them"),
        ({"a": ByIndex([1]), "b": ByIndex([1])}, "a dict of several sets"),
        ({"prompt": ["a"], "response": ["b"]}, r"a dict of columns \(prompt, response\): give records"),
        ({"prompt": "a", "response": "b"}, "one dict .* put it into a list"),
        ({}, r"data is a dict \(\)"),
        (["a text"], "record 1: expected a dict, got str 'a text'; give a list of dicts"),
        ([{"prompt": "a", "response": "b"}, ("a", "b")], "record 2: expected a dict, got tuple"),
        ([None], "record 1: expected a dict, got NoneType"),
        ([[{"prompt": "a", "response": "b"}]], "record 1: expected a dict, got list"),
        (b"bytes", "data is text"),
        (7, "data holds no records, it is of type int"),
        (Frame(), r'data is a Frame, .* give data\.to_dict\("records"\)'),
        (ArrowTable(), r"data is a ArrowTable, .* give data\.to_pylist\(\)"),
        (Table(), "record 1: expected a dict, got str 'prompt'"),
        ([], "data holds no sample"),
        (dict, "data is the class dict and holds no records: give a list of dicts"),
        (Table, "data is the class Table"),
        (iter(()), "data holds no sample"),
        ([{"input_ids": [1], "labels": [1]}], "records are texts here, not token ids"),
        ([{1: "a", "b": 2}], r"no known field in \['1', 'b'\]"),
    ],
)
def test_what_holds_no_records_says_what_to_give(data, says):
    with pytest.raises(InputError, match=says):
        references(data)


def test_a_generators_own_error_is_its_own():
    def rows():
        yield arithmetic(1)[0]
        raise RuntimeError("the user's")

    with pytest.raises(RuntimeError, match="the user's"):
        references(rows())
