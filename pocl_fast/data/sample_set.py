"""A data set as samples and tokens: out of what a user names or holds, with a report of what was left out of it.

Does not know how a sample becomes tokens (encoding.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import fit_all
from pocl_fast.data.length_report import LengthLimits, LengthReport
from pocl_fast.records.bad_records import BadRecords
from pocl_fast.records.samples import Sample, read_samples, samples_from
from pocl_fast.system.errors import InputError


class SetOptions(LengthLimits, Protocol):
    """How records become samples, and how long these may be: a run's options, a trainer's arguments."""

    @property
    def fields(self) -> dict[str, str]: ...
    @property
    def bad_records(self) -> Any: ...


@dataclass(frozen=True)
class SampleSet:
    """Samples, and those of them that fit as tokens; `encoded[i].index` is a position in `samples`. What the limits or
    the options took from a sample's tokens it has not either."""

    samples: Sequence[Sample]
    encoded: Sequence[EncodedSample]


def read_set(given: Any, encoder: SampleEncoder, options: SetOptions, name: str) -> tuple[SampleSet, LengthReport]:
    """The samples of a path, or of records, as tokens. `name` stands for records in messages.

    Raises `InputError` for what `read_samples` and `fit_all` refuse.
    """
    bad = BadRecords(options.bad_records)
    if isinstance(given, (str, Path)):
        name, samples = str(given), read_samples(given, fields=options.fields, bad=bad)
    else:
        samples = samples_from(given, name, fields=options.fields, bad=bad)
    fitted, report = fit_all(
        samples,
        encoder,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        long_prompts=options.long_prompts,
        name=name,
        bad=bad,
    )
    known = list(samples)
    for sample, _ in fitted:
        known[sample.index] = sample
    return SampleSet(known, [one for _, one in fitted]), report


class HeldOutOptions(Protocol):
    """Where the held-out samples come from."""

    @property
    def dev(self) -> str | None: ...
    @property
    def held_out(self) -> int | None: ...


def split(samples: SampleSet, options: HeldOutOptions, say: Callable[[str], object]) -> tuple[SampleSet, SampleSet]:
    """The samples to train on, and those that `held_out` takes of them where there is no file of such (else none).

    It takes at most a tenth of all, and at least one. Which they are depends on their prompts alone, and all samples of
    one prompt are on the same side. Raises `InputError` where fewer than two prompts differ.
    """
    if options.dev is not None or options.held_out is None:
        return samples, SampleSet(samples.samples, [])
    by_prompt: dict[bytes, set[int]] = {}
    for place, one in enumerate(samples.encoded):
        by_prompt.setdefault(hashlib.sha256(repr(list(one.prompt_ids)).encode()).digest(), set()).add(place)
    if len(by_prompt) < 2:
        raise InputError("no samples can be held out where all have one prompt: give held-out samples (--dev)")
    count = len(samples.encoded)
    wanted = max(1, min(options.held_out, count // 10))
    out: set[int] = set()
    for _, places in sorted(by_prompt.items()):
        out |= places if len(out) + len(places) <= wanted else set()
    out = out or min(by_prompt.values(), key=len)
    say(
        f"held out: {len(out):,} of {count:,} samples, which are not trained on but show how well the student answers"
        " (--held-out says how many, --dev names a file of others)"
    )
    sides = ([one for place, one in enumerate(samples.encoded) if (place in out) == side] for side in (False, True))
    train, dev = (SampleSet(samples.samples, side) for side in sides)
    return train, dev
