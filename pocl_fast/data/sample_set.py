"""A data set as samples and tokens: out of what a user names or holds, with a report of what was left out of it; and
which samples of several sets are the same.

Does not know how a sample becomes tokens (encoding.py).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import fit_all
from pocl_fast.data.length_report import LengthLimits, LengthReport
from pocl_fast.records.bad_records import BadRecords
from pocl_fast.records.messages import Message
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

    def used(self) -> Iterator[Sample]:
        """The samples that fit."""
        return (self.samples[one.index] for one in self.encoded)


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
    def dev(self) -> Mapping[str, str]: ...
    @property
    def held_out(self) -> int | None: ...


def split(samples: SampleSet, options: HeldOutOptions, say: Callable[[str], object]) -> tuple[SampleSet, SampleSet]:
    """The samples to train on, and those that `held_out` takes of them where there is no file of such (else none).

    It takes at most a tenth of all, and at least one. Which they are depends on their prompts alone, and all samples of
    one prompt are on the same side. Raises `InputError` where fewer than two prompts differ.
    """
    if options.dev or options.held_out is None:
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


# -- the same samples in two sets --------------------------------------------------------------------------------------


class SampleKeys:
    """What samples ask and are taught to answer, blanks and letter case aside: 8 bytes a prompt, and 8 for it with its
    answer, so that millions of samples can be compared with others."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self.prompts, self.pairs = array("Q"), array("Q")
        self._earlier_prompts, self._earlier_pairs = array("Q"), array("Q")  # of answers before a sample's last
        for sample in samples:
            self.add(sample)

    def add(self, sample: Sample) -> None:
        """Takes a sample in."""
        turns = _Turns()
        for place, message in enumerate(sample.messages):
            if place in sample.earlier:
                self._earlier_prompts.append(turns.key())
            turns.say(message)
            if place in sample.earlier:
                self._earlier_pairs.append(turns.key())
        self.prompts.append(turns.key())
        turns.say(sample.answer_turn)
        self.pairs.append(turns.key())

    def copies(self) -> int:
        """How many samples are the same as one before them."""
        return len(self.pairs) - len(np.unique(np.asarray(self.pairs)))

    def found_in(self, samples: Iterable[Sample]) -> tuple[int, int]:
        """How many of other samples are among these, with any of their references; and of how many others the prompt
        alone is."""
        prompts, pairs = _Sorted(self.prompts, self._earlier_prompts), _Sorted(self.pairs, self._earlier_pairs)
        whole = asked = 0
        for sample in samples:
            turns = _Turns()
            for message in sample.messages:
                turns.say(message)
            if turns.key() in prompts:
                same = any(turns.key_with(answer) in pairs for answer in _answers(sample))
                whole, asked = whole + same, asked + (not same)
        return whole, asked


class _Turns:
    """A hash of a conversation so far."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def say(self, message: Message) -> None:
        self._digest.update(_plain_turn(message))

    def key(self) -> int:
        return int.from_bytes(self._digest.digest(), "little")

    def key_with(self, answer: Message) -> int:
        digest = self._digest.copy()
        digest.update(_plain_turn(answer))
        return int.from_bytes(digest.digest(), "little")


class _Sorted:
    """Keys in order, to look up single ones."""

    def __init__(self, *keys: array[int]) -> None:
        self._keys = np.unique(np.concatenate([np.asarray(some, dtype=np.uint64) for some in keys]))

    def __contains__(self, key: int) -> bool:
        wanted = np.uint64(key)
        place = int(np.searchsorted(self._keys, wanted))
        return place < len(self._keys) and bool(self._keys[place] == wanted)


def _answers(sample: Sample) -> list[Message]:
    """The answers that a sample accepts, as turns."""
    if sample.answer is not None:
        return [sample.answer]
    return [{"role": "assistant", "content": text} for text in sample.references]


def _plain_turn(message: Message) -> bytes:
    """Who says what and calls which tools, without differences of blanks and letter case."""
    calls = [call.get("function") for call in message.get("tool_calls") or ()]
    said = [message["role"], " ".join(message["content"].split()).casefold(), calls]
    return json.dumps(said, sort_keys=True, default=str).encode() + b"\n"


def same_samples_lines(
    train: tuple[str, Iterable[Sample]],
    sets: Sequence[tuple[str, Iterable[Sample]]] = (),
    *,
    tests: Collection[str] = (),
    choosing: str | None = None,
) -> list[str]:
    """Lines that count the copies within the training samples, and the samples of other sets that are among them too;
    none where there are no such. Sets have names; `tests` are those that nothing may be chosen or learnt by, and are
    compared with the set that is `choosing` weights, too."""
    name, samples = train
    keys = SampleKeys(samples)
    lines = [line] if (line := copies_line(name, keys)) else []
    known = {title: list(of_set) for title, of_set in sets}
    for title, of_set in known.items():
        if any(found := keys.found_in(of_set)):
            spoilt = "the student is trained on them, and its scores on these say nothing of other samples"
            if title in tests:
                spoilt = "the student is trained on them, so this is no test: take them out of the training samples"
            lines.append(f"{title}: {_counted(found, len(of_set))} among the training samples too: {spoilt}")
    if choosing is not None:
        chosen_by = SampleKeys(known[choosing])
        for title in (one for one in known if one in tests):
            if any(found := chosen_by.found_in(known[title])):
                lines.append(
                    f"{title}: {_counted(found, len(known[title]))} in the {choosing} too, by whose scores the"
                    " weights are chosen: on these it is no test"
                )
    return lines


def copies_line(name: str, keys: SampleKeys) -> str | None:
    """The line that counts the copies within a set; None where there are none."""
    if not (copies := keys.copies()):
        return None
    return (
        f"{name}: {copies:,} of {len(keys.pairs):,} samples are copies of others (equal prompt and answer, blanks and"
        " letter case aside), and weigh so much more"
    )


def _counted(found: tuple[int, int], count: int) -> str:
    """How many samples of a set are found elsewhere, in words."""
    whole, asked = found
    parts = [f"{whole:,} of {count:,} samples are"] if whole else []
    if asked:
        parts.append(f"the prompts alone of {asked:,}" + (" more are" if whole else f" of {count:,} samples are"))
    return " and ".join(parts)
