"""What a run's report shows of its samples: three of them as the model sees them, and how long all are.

Knows the curriculum and what the steps have noted. Does not know the rest of the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pocl_fast.curriculum.scores import open_difficulty
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.inspection.command import encoder_for
from pocl_fast.inspection.inspected import Inspected, Inspector
from pocl_fast.inspection.length_pictures import svg
from pocl_fast.inspection.lengths import Lengths, in_words
from pocl_fast.inspection.page import folded
from pocl_fast.options.run import RunConfig
from pocl_fast.records.bad_records import BadRecord, BadRecords
from pocl_fast.records.samples import Sample, iter_samples
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError

# the first and the last sample of a curriculum that orders them
_ENDS = {"pocl": ("easiest", "hardest"), "reverse": ("hardest", "easiest"), "length": ("shortest", "longest")}
_FIRST = ("first", "second", "third")
_READ = 10_000  # samples among which the three are chosen: no report reads a large file to its end


def samples_part(
    run: Path, config: RunConfig, stamps: Mapping[str, Any], encoder: SampleEncoder | None = None
) -> tuple[Markup, str]:
    """Three training samples as the model sees them, and why there are none where that is so. `encoder` is the run's
    where it is loaded already."""
    try:
        return folded(_chosen(run, config, stamps, encoder)), ""
    except InputError as error:
        return Markup(""), f"They cannot be shown any more: {error}"


def lengths_part(stamps: Mapping[str, Any]) -> tuple[Markup, list[str]]:
    """The histograms of lengths, and what reading and the limits took away, in words; empty where no step has counted
    them yet."""
    known = [stamp for stamp in stamps.values() if "sample_lengths" in stamp]
    if not known:
        return Markup(""), []
    lengths = Lengths.from_json(known[-1]["sample_lengths"])
    pictures = [
        svg(lengths.prompts, "prompts", "--max-prompt-length"),
        svg(lengths.samples, "prompts with answers", "--max-length"),
    ]
    return Markup("").join(pictures), [known[-1]["read"], *in_words(lengths)]


def _chosen(
    run: Path, config: RunConfig, stamps: Mapping[str, Any], encoder: SampleEncoder | None
) -> list[tuple[str, Inspected]]:
    if config.data.train is None:
        raise InputError("the run has no --train")
    source = source_of(config.data.train)
    made_from = [stamp["made_from"]["train data"] for stamp in stamps.values() if "train data" in stamp["made_from"]]
    if made_from and source.fingerprint() != made_from[-1]:
        raise InputError(f"{source.name} has changed since the run read it")
    if encoder is None:
        saved = run / "student"
        known = (saved / "tokenizer_config.json").is_file()
        encoder = encoder_for(config, str(saved) if known else None, run)
    inspector = Inspector(source, encoder, config.data)
    if (wanted := _names(run, config)) is None:
        return list(zip(_FIRST, _used(inspector, config), strict=False))
    samples = _read(config, max(wanted) + 1)
    return [(name, inspector.look_at(samples[index])) for index, name in wanted.items() if index in samples]


def _names(run: Path, config: RunConfig) -> dict[int, str] | None:
    """The indices of the samples to show, and what each is: of a curriculum the easiest, the middle one and the
    hardest (or shortest and longest), of what was measured or trained on in the file's order or a random one the first
    three. None where a run has not chosen among its samples yet."""
    path, measured = run / "curriculum.json", run / "difficulty.parquet"
    if path.is_file():
        order = Curriculum.load(path).order
    elif measured.is_file():
        order = next(open_difficulty(measured).iter_batches(_READ, columns=["index"]))["index"].to_numpy()
    else:
        return None
    read = [int(index) for index in order if index < _READ]
    if not read:
        raise InputError(f"none of the first {_READ:,} samples is trained on")
    if not path.is_file() or config.schedule.curriculum not in _ENDS:
        return dict(zip(sorted(read), _FIRST, strict=False))
    some = "" if len(read) == len(order) else f" of the first {_READ:,} samples"
    first, last = _ENDS[config.schedule.curriculum]
    places = {0: first, len(read) // 2: "middle", len(read) - 1: last}
    return {read[place]: name + some for place, name in places.items()}


def _used(inspector: Inspector, config: RunConfig) -> Iterator[Inspected]:
    """The samples that are trained on, from the file's beginning."""
    for sample in _read(config, _READ).values():
        try:
            one = inspector.look_at(sample)
        except BadRecord as error:
            BadRecords(config.data.bad_records).found(error, sample.line)
            continue
        if not one.left_out:
            yield one


def _read(config: RunConfig, count: int) -> dict[int, Sample]:
    """The first samples of the training file, by their index."""
    data = config.data
    source = source_of(str(data.train))
    samples = iter_samples(source, fields=data.fields, bad=BadRecords(data.bad_records))
    return {sample.index: sample for sample in islice(samples, count)}
