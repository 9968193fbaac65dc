"""The sets of samples that a student is scored on: what each is called, and whether any chooses weights.

Knows how sets are named, in words and in YAML. Does not read them.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pocl_fast.options.run import RunConfig

SETS = ("dev", "test")  # options that name any number of sets: [NAME=]FILE words on the command line
HELD_OUT = "held-out"  # what the samples are called that are taken out of --train
Role = Literal["dev", "test"]
_NAME = re.compile(r"\w[\w.+-]{0,99}")  # which is a part of the names of files
_PACKED = re.compile(r"\.(gz|bz2|xz|zst|lz4|br|zip)$", re.IGNORECASE)
_SUFFIX = re.compile(r"\.[A-Za-z]\w{1,7}$")


@dataclass(frozen=True)
class NamedSet:
    """A set of samples to score on."""

    name: str
    role: Role
    source: str | None  # as it was given; None: held out of the training samples

    @property
    def option(self) -> str:
        """The option that names it, for messages."""
        return "--dev (or --held-out)" if self.role == "dev" else "--test"


def sets_of(config: RunConfig) -> list[NamedSet]:
    """The sets of a run: those of --dev, or what is held out of --train, and then those of --test."""
    data = config.data
    dev: dict[str, str | None] = {**data.dev}
    if not dev and data.held_out is not None:
        dev = {HELD_OUT: None}
    made = [NamedSet(name, "dev", source) for name, source in dev.items()]
    return made + [NamedSet(name, "test", source) for name, source in data.test.items()]


def evaluations_choose(config: RunConfig) -> bool:
    """Whether evaluations in training choose a stage's weights, or when it ends."""
    evaluates = config.trainer.set.get("eval_strategy", "epoch") != "no"
    return evaluates and (config.stages.stage_weights != "last" or config.stages.patience is not None)


def sets_from(given: Any, option: str) -> dict[str, str]:
    """Name -> source, out of a dict, a source, or [NAME=]FILE words. A source alone is called as the option, of several
    each by its own name. Raises ValueError for what is no name, or one of two sets."""
    if isinstance(given, Mapping):
        pairs = [(_checked(str(name), f"{name}: {source}"), str(source)) for name, source in given.items()]
    elif not isinstance(given, (str, Path, list, tuple)):
        raise ValueError(f"must be a file, a list of [NAME=]FILE, or a dict of names and files, got {given!r}")
    else:
        words = [given] if isinstance(given, (str, Path)) else list(given)
        pairs = _of_words([str(word) for word in words], option)
    check_apart(pairs)
    return dict(pairs)


def check_apart(pairs: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError where two sets have one name, but for letter case, which some folders do not tell apart."""
    known: dict[str, str] = {}
    for name, source in pairs:
        if (before := known.get(name.casefold())) is not None:
            raise ValueError(
                f"two sets are called {name} ({before} and {source}): give one of them another name, NAME=FILE"
            )
        known[name.casefold()] = source


def check_set_names(config: RunConfig) -> None:
    """Raises ValueError where two of a run's sets have one name."""
    check_apart([(one.name, str(one.source or f"held out of {config.data.train}")) for one in sets_of(config)])


def _of_words(words: Sequence[str], option: str) -> list[tuple[str, str]]:
    named = [_named(word) for word in words]
    if len(named) == 1 and named[0][0] is None:
        return [(option, named[0][1])]
    return [(_own_name(source) if name is None else name, source) for name, source in named]


def _named(word: str) -> tuple[str | None, str]:
    """The name before the first "=", and the source; no name where a file is called like the whole word."""
    name, equals, source = word.partition("=")
    if not equals or _is_there(word):
        return None, word
    return _checked(name.strip(), word), source


def _is_there(word: str) -> bool:
    try:
        return Path(word).expanduser().exists() or bool(glob.has_magic(word) and glob.glob(word))
    except (OSError, ValueError, RuntimeError):  # no name that a file can have; a home that is not there
        return False


def _checked(name: str, given: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{given!r}: a set's name has letters, digits, and . _ + - behind the first of them, at most 100: {name!r}"
            " is none. Give NAME=FILE"
        )
    return name


def _own_name(source: str) -> str:
    """What a source is called by itself: its last part, without what its kind is called."""
    last = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    name = re.sub(r"[^\w.+-]+", "-", _SUFFIX.sub("", _PACKED.sub("", last))).strip("-.+")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{source!r} tells no name for its set: give NAME={source}")
    return name
