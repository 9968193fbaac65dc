"""How long reading Parquet to tokens takes beside pyarrow and the tokenizer alone, and beside `apply_chat_template` of
each record; and whether its memory is flat.

The aim is 1.3 times pyarrow and the tokenizer; docs/log.md has what was measured. Three sides in this process, on the
same file, a piece of each in turns; the figures are medians. "ours" is the whole way of a run:
records, checked and counted fields, the template's text of prompt and answer, what the template leaves out, tokens cut
at the answer. "bare" is pyarrow's `iter_batches` and the tokenizer on 1000 texts at a time, where the text that the
template writes lies ready in a column of its own: no template, no prompt and answer, no check. "trainer" is
`apply_chat_template(tokenize=True)` of each record, which is what a trainer's own preparation does (for Alpaca: the
text by `str.format`, then the tokenizer, each record). The first tokens of ours and of bare are compared. Memory is the
growth of this process's peak while a quarter of the file is read as a run reads a large file, and while all of it is.

    python benchmarks/read_records.py [--data FILE] [--rows 20000] [--repeats 5] [--threads] [--one messages]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.stream import SampleStream
from pocl_fast.models.loading import load_tokenizer
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import iter_samples
from pocl_fast.records.sources import Source, source_of
from pocl_fast.run.demo import bundled_data
from pocl_fast.templates import alpaca

PIECE = 1000
LIMITS = {"max_length": 8192, "max_prompt_length": 4096}
FORMS = ("prompt", "messages", "alpaca")


def given(path: Path) -> list[dict[str, str]]:
    """The records of a JSON Lines file of instruction samples, in the Alpaca form."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]
    return [
        {"instruction": row["instruction"], "input": row.get("input") or "", "output": answer}
        for row, answer in zip(rows, first, strict=True)
    ]


def record(rows: list[dict[str, str]], place: int, form: str) -> dict[str, Any]:
    """One record of the file, unlike all others: with its number in question and answer."""
    row = rows[place % len(rows)]
    question, answer = f"{row['instruction']} ({place})", f"{row['output']} ({place})"
    if form == "alpaca":
        return {"instruction": question, "input": row["input"], "output": answer}
    question += f"\n\n{row['input']}" if row["input"] else ""
    if form == "prompt":
        return {"prompt": question, "response": answer}
    other = rows[(place * 7 + 1) % len(rows)]
    turns = (("user", other["instruction"]), ("assistant", other["output"]), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def turns_of(record: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in record:
        return record["messages"]
    pairs = (("user", record["prompt"]), ("assistant", record["response"]))
    return [{"role": role, "content": content} for role, content in pairs]


def text_of(tokenizer: Any, record: dict[str, Any]) -> str:
    if "instruction" not in record:
        return str(tokenizer.apply_chat_template(turns_of(record), tokenize=False))
    form = alpaca.WITH_INPUT if record["input"] else alpaca.NO_INPUT
    return form.format(**record) + record["output"]


def write(path: Path, texts: Path, rows: list[dict[str, str]], count: int, form: str, tokenizer: Any) -> None:
    """A file with `count` records, and one with their texts."""
    writers: list[pq.ParquetWriter] = []
    for start in range(0, count, 10_000):
        piece = [record(rows, place, form) for place in range(start, min(count, start + 10_000))]
        ready = [{"text": text_of(tokenizer, one)} for one in piece]
        tables = [pa.Table.from_pylist(one) for one in (piece, ready)]
        writers = writers or [
            pq.ParquetWriter(*one) for one in zip((path, texts), (t.schema for t in tables), strict=True)
        ]
        for writer, table in zip(writers, tables, strict=True):
            writer.write_table(table)
    for writer in writers:
        writer.close()


def bare(path: Path, tokenizer: Any) -> Iterator[list[Any]]:
    """The tokens of the records, by pieces."""
    for batch in pq.ParquetFile(path).iter_batches(PIECE):
        yield tokenizer(batch.column(0).to_pylist(), add_special_tokens=False).input_ids


def trainer(source: Source, tokenizer: Any) -> Iterator[list[Any]]:
    piece: list[Any] = []
    for _, one in source.records(""):
        if "instruction" in one:
            piece.append(tokenizer(text_of(tokenizer, one), add_special_tokens=False).input_ids)
        else:
            piece.append(tokenizer.apply_chat_template(turns_of(one), tokenize=True).input_ids)
        if len(piece) == PIECE:
            yield piece
            piece = []
    yield piece


def ours(source: Source, encoder: SampleEncoder) -> Iterator[list[Any]]:
    for piece in SampleStream(source, encoder, DataOptions(**LIMITS, long_prompts="skip")):
        yield [encoded.ids for _, encoded in piece[:1]] + piece[1:]  # tokens of the first alone: they are joined for it


def in_turns(sides: dict[str, Iterator[list[Any]]]) -> dict[str, Spent]:
    """What each side takes, a piece of the file of each in turns: others who use the machine slow all of them alike."""
    spent = {name: Spent() for name in sides}
    left = dict(sides)
    gc.collect()
    while left:
        for name, side in list(left.items()):
            start, worked = time.perf_counter(), time.process_time()
            piece = next(side, None)
            spent[name].clock += time.perf_counter() - start
            spent[name].processors += time.process_time() - worked
            if piece is None:
                del left[name]
                continue
            spent[name].records += len(piece)
            spent[name].first = spent[name].first or list(piece[0])
    return spent


@dataclass
class Spent:
    """What a side has taken: seconds by the clock, and of all processors together."""

    clock: float = 0
    processors: float = 0
    records: int = 0
    first: list[int] = field(default_factory=list)  # tokens of the first record


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def growth_mib(side: Callable[[], Any]) -> float:
    """By how much the process's peak of memory grows."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = peak_mib()
    kept = side()
    grown = peak_mib() - start
    del kept
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=bundled_data("train"), help="JSON Lines of instruction samples")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", action="store_true", help="the tokenizer's threads, of bare and ours alike")
    parser.add_argument("--one", choices=FORMS, help="this form of records alone")
    parser.add_argument("--kept", action="store_true", help="memory of all samples kept, too")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.threads else "false"
    print(f"{options.rows:,} records, {'threads' if options.threads else 'one thread'}, us a record")
    for form in (options.one,) if options.one else FORMS:
        with tempfile.TemporaryDirectory() as folder:
            measure(form, Path(folder) / "records.parquet", options)


def measure(form: str, path: Path, options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer("bundled")
    if form == "alpaca":
        tokenizer.chat_template = None
    texts, part = path.with_suffix(".texts"), path.with_suffix(".part")
    rows = given(options.data)
    write(path, texts, rows, options.rows, form, tokenizer)
    write(part, texts.with_suffix(".other"), rows, options.rows // 4, form, tokenizer)
    source, quarter = source_of(path), source_of(part)
    encoder = SampleEncoder(tokenizer)
    taken: list[dict[str, Spent]] = []
    for _ in range(options.repeats):
        sides = {"bare": bare(texts, tokenizer), "trainer": trainer(source, tokenizer), "ours": ours(source, encoder)}
        taken.append(in_turns(sides))
        assert {one.records for one in taken[-1].values()} == {options.rows}, taken[-1]
        firsts = {name: one.first for name, one in taken[-1].items()}
        assert firsts["bare"][: len(firsts["ours"]) - 1] == firsts["ours"][:-1], "other tokens"  # the last: end of turn
    for name in ("clock", "processors"):
        median = {side: statistics.median(getattr(one[side], name) for one in taken) for side in taken[0]}
        us = ", ".join(f"{side} {value / options.rows * 1e6:.0f}" for side, value in median.items())
        ratios = []
        for side in ("bare", "trainer"):
            each = [getattr(one["ours"], name) / getattr(one[side], name) for one in taken]
            ratios.append(f"ours / {side} {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
        print(f"{form}, {name}: {us}; {', '.join(ratios)}", flush=True)
    grown = [growth_mib(lambda one=one: sum(map(len, ours(one, encoder)))) for one in (quarter, source)]
    print(f"{form}: peak memory grows by {grown[0]:.0f} MiB over a quarter of the file, {grown[1]:.0f} over all of it")
    if options.kept:
        keeping(form, source, encoder)


def keeping(form: str, source: Source, encoder: SampleEncoder) -> None:
    """Prints what the samples and tokens of the whole file take."""
    limits = {**LIMITS, "long_prompts": "skip", "name": source.name}
    kept: list[Any] = []
    texts = growth_mib(lambda: kept.extend(iter_samples(source)))
    tokens = growth_mib(lambda: kept.append(encode_all(list(kept), encoder, **limits)[0]))
    count = sum(len(one) for one in kept[-1])
    print(
        f"{form}: all kept, samples {texts:.0f} MiB, {count:,} tokens {tokens:.0f} MiB"
        f", {tokens * 2**20 / count:.1f} bytes a token"
    )


if __name__ == "__main__":
    main()
