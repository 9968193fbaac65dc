"""The rows of Parquet files, Arrow files and Arrow tables as dicts, a piece at a time.

Knows pyarrow. Does not know what the columns mean (samples.py), nor `datasets` (hub.py).

A struct of a table has a value for every field that any row has, and fills in nulls. So a null field of a struct is an
absent one here: rows are as they were before they were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pocl_fast.records import json_lines
from pocl_fast.records.file_kinds import ARROW_STREAM
from pocl_fast.system.errors import InputError

PIECE_ROWS, PIECE_BYTES = 4096, 1 << 24  # most rows and about most bytes that are in memory as Python's objects
_BUFFER = 1 << 20  # bytes of a column that are read at a time: a row group may be as large as the file
_INDEX = "__index_level_"  # what pandas calls the column of an index without a name, which is no field
_AGAIN = "write it or get it again"
_STREAM_END = ARROW_STREAM + bytes(4)


def parquet_rows(file: Path, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file, with their numbers from 1. `path` stands for the file in messages.

    Raises `InputError` for a file that is cut off or damaged, naming the row up to which it could be read.
    """
    try:
        table = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is a Parquet file that is cut off or damaged: its end, which says what it holds, cannot be read"
            f" ({error}); {_AGAIN}"
        ) from error
    with table:
        rows = _piece_rows(parquet_bytes(table.metadata), table.metadata.num_rows)
        columns = [name for name in _unique(table.schema_arrow.names, path) if not name.startswith(_INDEX)]
        groups = [name for name in table.schema_arrow.names if name.startswith(_INDEX)]
        batches = table.iter_batches(rows, columns=columns if groups else None)
        yield from _whole(batches, table.metadata.num_rows, path)


def parquet_bytes(metadata: pq.FileMetaData) -> int:
    """How many bytes a Parquet file's columns have, uncompressed."""
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _unique(names: Sequence[str], path: Path) -> Sequence[str]:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f'{path} has two columns of the name "{twice}", and one of the two would be lost')
    return names


def _piece_rows(size: int, rows: int) -> int:
    return max(1, min(PIECE_ROWS, PIECE_BYTES * rows // max(1, size)))


def _whole(batches: Iterable[pa.RecordBatch], rows: int, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for number, row in numbered(batches, path):
            yield number, row
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is damaged: it could be read up to row {number} of {rows} ({error}); {_AGAIN}"
        ) from error
    if number < rows:
        raise InputError(f"{path} is damaged: it has {number} rows where its end says {rows}; {_AGAIN}")


def arrow_rows(file: Path, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of an Arrow file or stream (Feather, `datasets`), as `parquet_rows` gives them."""
    number = 0
    try:
        with pa.memory_map(str(file)) as mapped:
            for number, row in numbered(arrow_batches(mapped, path), path):
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is an Arrow file that is missing, cut off or damaged: it could be read up to row {number}"
            f" ({error}); {_AGAIN}"
        ) from error


def arrow_batches(file: pa.MemoryMappedFile, path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file or stream. Raises pyarrow's error for one that is damaged."""
    if file.read(4) == ARROW_STREAM:
        size = file.size()
        file.seek(max(0, size - 8))
        if file.read(8) != _STREAM_END:  # one that ends between two batches would look whole
            raise pa.ArrowInvalid("the mark of its end is missing")
        file.seek(0)
        with pa.ipc.open_stream(file) as stream:
            _unique(stream.schema.names, path)
            yield from map(_sound, stream)
    else:
        file.seek(0)
        with pa.ipc.open_file(file) as reader:
            _unique(reader.schema.names, path)
            yield from (_sound(reader.get_batch(i)) for i in range(reader.num_record_batches))


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)  # a damaged offset would be followed out of the file, which ends the process
    return batch


def numbered(batches: Iterable[pa.RecordBatch | pa.Table], name: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of batches or tables with their numbers, from 1. `name` stands for them in messages.

    Raises `InputError` for text that is not UTF-8.
    """
    number = 1
    for batch in batches:
        rows = _piece_rows(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, rows):
            piece = batch.slice(start, rows)
            yield from enumerate(_rows(piece, name, number), start=number)
            number += piece.num_rows


def _rows(piece: pa.RecordBatch | pa.Table, name: Path | str, number: int) -> Iterator[dict[str, Any]]:
    fields = [field for field in piece.schema.names if not field.startswith(_INDEX)]
    columns = []
    for field in fields:
        column = piece.column(field)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
        try:
            columns.append(values(column))
        except (UnicodeDecodeError, pa.ArrowException) as error:  # the one or the other, by version
            raise InputError(
                f'{name}, rows {number} to {number + piece.num_rows - 1}: column "{field}" has text that is not UTF-8'
            ) from error
        except (ValueError, RecursionError) as error:  # of columns of JSON
            raise InputError(
                f'{name}, rows {number} to {number + piece.num_rows - 1}: column "{field}" has text that is not JSON'
                f" ({json_lines.in_words(error)})"
            ) from error
    return (dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True))


def values(array: pa.Array) -> list[Any]:
    """The values of an array as Python's, with dicts for structs and maps. Several times as fast as `to_pylist`."""
    kind = array.type
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    if types.is_struct(kind):
        return _structs(array)
    if types.is_map(kind):
        return [None if pairs is None else dict(pairs) for pairs in array.to_pylist()]
    if types.is_nested(kind) and not types.is_union(kind):
        return _lists(array)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return values(pc.cast(array, kind.value_type) if types.is_dictionary(kind) else pc.run_end_decode(array))
    if isinstance(kind, pa.BaseExtensionType):
        stored = values(array.storage)
        if kind.extension_name == "arrow.json":
            return [None if text is None else json_lines.decoded(text) for text in stored]
        return stored
    return array.to_pylist()


def _structs(array: pa.StructArray) -> list[Any]:
    names = [field.name for field in array.type]
    children = array.flatten()  # null where the struct is
    columns = [values(child) for child in children]
    if not columns:
        structs: list[Any] = [{} for _ in range(len(array))]
    elif any(child.null_count for child in children):
        every = zip(*columns, strict=True)
        structs = [{name: one for name, one in zip(names, row, strict=True) if one is not None} for row in every]
    else:
        structs = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if not array.null_count:
        return structs
    there = array.is_valid().to_pylist()
    return [struct if valid else None for struct, valid in zip(structs, there, strict=True)]


def _lists(array: Any) -> list[Any]:
    items = values(array.flatten())  # of those that are no null
    lists: list[Any] = []
    start = 0
    for length in pc.list_value_length(array).to_pylist():
        if length is None:
            lists.append(None)
        else:
            lists.append(items[start : start + length])
            start += length
    return lists
