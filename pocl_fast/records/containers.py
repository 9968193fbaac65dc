"""Records out of what a user gives to hold them, and what is said of containers that are none.

Knows Python's containers, NumPy's values within records, and the others by what they can do: no pandas, datasets or
torch is imported. Does not know what a record has (samples.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.system.errors import InputError

WANTED = "give a list of dicts, a datasets.Dataset, or the path of a file of JSON Lines or Parquet"
_SIMPLE = frozenset({str, int, float, bool, type(None)})
# what tables are called by their libraries -> how their rows become dicts; iterating them gives columns
_TABLES = {"to_pylist": "to_pylist()", "to_dicts": "to_dicts()", "to_dict": 'to_dict("records")'}


def rows(data: Any, name: str) -> Iterator[Mapping[str, Any] | BadRecord]:
    """The records of a list, a generator, a `datasets.Dataset`, or anything else that gives dicts one by one, by
    iterating or by index; what is wrong with one, in place of what is no dict. `name` stands for the container in
    messages.

    Raises `InputError` that says what to give for one that holds no records: splits, columns, tables, texts, tuples.
    """
    if isinstance(data, type):
        raise InputError(f"{name} is the class {data.__name__} and holds no records: {WANTED}")
    if isinstance(data, Mapping):
        raise InputError(_of_mapping(data, name))
    if not isinstance(data, (list, tuple)) and hasattr(data, "columns"):
        for method, call in _TABLES.items():
            if hasattr(data, method):
                kind = type(data).__name__
                raise InputError(f"{name} is a {kind}, and iterating it gives no records: give {name}.{call}")
    of_datasets = type(data).__module__.partition(".")[0] == "datasets"
    if of_datasets:
        from pocl_fast.records import hub  # loads pyarrow, as `datasets` has

        if hub.is_plain(data):
            yield from (row for _, row in hub.dataset_rows(data, name))
            return
    for number, row in enumerate(_each(data, name), start=1):
        if not isinstance(row, Mapping):
            said = f"{name}, record {number}: expected a dict, got {type(row).__name__} {row!r:.60}; {WANTED}"
            yield BadRecord(said, "no object")
            continue
        try:
            yield {field: plain(value, filled=of_datasets) for field, value in row.items()}
        except RecursionError:  # which is said of the record where it is read
            yield row


def plain(value: Any, *, filled: bool = False) -> Any:
    """A value without NumPy: its arrays, which pandas makes of lists, as lists, its numbers as Python's. `filled`: it
    is out of a table, where a null field within a value is an absent one."""
    if value.__class__ in _SIMPLE:
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {field: plain(one, filled=filled) for field, one in value.items() if not (filled and one is None)}
    return [plain(one, filled=filled) for one in value] if isinstance(value, (list, tuple)) else value


def _each(data: Any, name: str) -> Iterable[Any]:
    if isinstance(data, (str, bytes)):
        raise InputError(f"{name} is text: {WANTED}")
    if hasattr(data, "__iter__"):
        return data  # type: ignore[no-any-return]
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):  # a torch Dataset, which may have no end to iter()
        return (data[i] for i in range(len(data)))
    raise InputError(f"{name} holds no records, it is of type {type(data).__name__}: {WANTED}")


def _of_mapping(data: Mapping[Any, Any], name: str) -> str:
    """What a dict holds, by its values, and what to give."""
    fields = [str(field) for field in data]
    some = ", ".join(fields[:5]) + (", ..." if len(fields) > 5 else "")
    values = list(data.values())
    if all(_holds_rows(value) for value in values) and values:
        return (
            f"{name} is a dict of several sets ({some}): give one of them, as {name}[{fields[0]!r}]."
            " Further ones can be scored one by one with PoclTrainer.evaluate"
        )
    if values and all(isinstance(value, (list, tuple)) and not isinstance(value, str) for value in values):
        return f"{name} is a dict of columns ({some}): give records, as datasets.Dataset.from_dict({name}) does"
    if any(isinstance(value, str) for value in values):
        return f"{name} is one dict ({some}) where records are expected: put it into a list"
    return f"{name} is a dict ({some}): {WANTED}"


def _holds_rows(value: Any) -> bool:
    """Whether a value looks like a set of records: a path's text does not, a list of dicts and a Dataset do."""
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], Mapping)
    return not isinstance(value, (str, bytes, int, float, Mapping, type(None))) and hasattr(value, "__getitem__")
